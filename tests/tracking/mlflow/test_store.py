"""A database that several make at once, or that nobody finishes."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest
from fixtures.mirrored_runs import assert_mirrored, finish, fork, make_run

from runner.tracking.mlflow import store
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.rundir import RunDir


@pytest.mark.cold  # where processes are warm databases are copied
@pytest.mark.unmeasured
def test_a_process_killed_while_it_creates_the_database_leaves_no_unusable_file(tmp_path: Path):
    """As a job's mirror is, when the job is requeued right after its start."""
    database = tmp_path / "mlflow.db"
    maker = fork(lambda: store.connect(f"sqlite:///{database}"))
    begun = [database, database.with_name(".mlflow.db.new")]
    while not any(path.exists() and path.stat().st_size > 100_000 for path in begun):
        assert os.waitpid(maker, os.WNOHANG) == (0, 0), "it was done before it could be killed"
        time.sleep(0.001)
    os.kill(maker, signal.SIGKILL)
    os.waitpid(maker, 0)
    assert not database.exists(), "killed too late, or made in place"
    assert store.connect(f"sqlite:///{database}").search_experiments()
    assert [path.name for path in tmp_path.glob("*mlflow.db*") if path.suffix != ".lock"] == ["mlflow.db"]


@pytest.mark.cold
@pytest.mark.unmeasured
def test_six_start_together_on_a_fresh_database(tmp_path: Path) -> None:
    runs = [finish(make_run(tmp_path, f"run{number}")) for number in range(6)]
    together = time.monotonic() + 0.3
    children = [fork(functools.partial(_first_try, rundir, together)) for rundir in runs]
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for rundir in runs:
        assert_mirrored(rundir, "FINISHED")
    names = [found.name for found in store.connect(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()]
    assert sorted(names) == ["Default", "tests"]


def _first_try(rundir: RunDir, together: float) -> None:
    time.sleep(max(0.0, together - time.monotonic()))
    if problem := MlflowRun.of(rundir).try_update():
        raise AssertionError(problem)
