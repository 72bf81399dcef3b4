"""Many runs are uploaded with few commits, and as completely as one by one."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import functools
import os
import shutil
import signal
from pathlib import Path

import pytest
from fixtures.mirrored_runs import assert_mirrored, commits_of, finish, fork, make_run, outputs

from runner.files import write_atomic
from runner.tracking import metrics_log
from runner.tracking.mlflow import batch, store
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.rundir import RunDir


def many(outputs: Path, count: int = 3) -> list[RunDir]:
    """Runs that have ended; one of them never started."""
    runs = [finish(make_run(outputs, f"run{number}")) for number in range(count - 1)]
    waiting = make_run(outputs, "waiting")
    waiting.write_state(status="killed", reason="cancelled before it started")
    return [*runs, waiting]


def in_mlflow(outputs: Path) -> int:
    return len(store.read_sqlite(outputs / "mlflow.db", ["SELECT run_uuid FROM runs"])[0])


def test_many_runs_take_as_many_commits_as_one(outputs: Path) -> None:
    rundirs, client = many(outputs), store.connect(f"sqlite:///{outputs}/mlflow.db")
    with commits_of(client) as commits:
        runs = [MlflowRun.of(rundir) for rundir in rundirs]
        batch.update(runs)
        assert len(commits) == 2
        for run in runs:
            run.update()  # as the callers do, for what has failed
        assert len(commits) == 2, "nothing is left to do"
    for rundir in rundirs[:2]:
        run = assert_mirrored(rundir, "FINISHED")
        assert {"model", "config.yaml", "samples.json", "train.log", "environment.json"} <= {
            item.path for item in client.list_artifacts(run.info.run_id)
        }
        assert run.data.params["lora.r"] == "8"
    killed = assert_mirrored(rundirs[2], "KILLED")
    assert killed.data.tags["runner.reason"] == "cancelled before it started"


@pytest.mark.parametrize("where", ["send_rows", "send_files", "send_end"])
def test_a_killed_process_loses_nothing_and_doubles_nothing(
    outputs: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundirs = many(outputs)

    def killed_at_the_second_run() -> None:
        plain, calls = getattr(MlflowRun, where), []

        def call(*words: object, **options: object) -> None:
            plain(*words, **options)
            calls.append(None)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(MlflowRun, where, call)
        batch.update(map(MlflowRun.of, rundirs))

    assert os.waitstatus_to_exitcode(os.waitpid(fork(killed_at_the_second_run), 0)[1]) == -signal.SIGKILL
    assert in_mlflow(outputs) == (0 if where == "send_rows" else 3)
    assert len(list((outputs / "mlartifacts").glob("*"))) <= in_mlflow(outputs), "no files of a run that is not there"
    batch.update(map(MlflowRun.of, rundirs))
    for rundir, status in zip(rundirs, ("FINISHED", "FINISHED", "KILLED"), strict=True):
        assert "runner.mirrored" in assert_mirrored(rundir, status).data.tags
    assert in_mlflow(outputs) == 3


def test_a_copy_of_a_folder_is_the_same_run(outputs: Path) -> None:
    rundir = make_run(outputs, "run")
    rundir.write_state(status="killed")
    copy = RunDir(Path(shutil.copytree(rundir.path, outputs / "copy")))
    batch.update(map(MlflowRun.of, (rundir, copy)))
    assert in_mlflow(outputs) == 1
    assert copy.read_manifest()["mlflow"] == rundir.read_manifest()["mlflow"]


def test_what_fails_is_left_to_the_upload_of_one_run(outputs: Path) -> None:
    gone, blocked, fine = rundirs = many(outputs)
    MlflowRun.of(gone).update()
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    client.delete_run(gone.read_manifest()["mlflow"]["run_id"])
    runs = [MlflowRun.of(rundir) for rundir in rundirs]
    blocked.manifest_lock.unlink(missing_ok=True)
    blocked.manifest_lock.mkdir()
    batch.update(runs)
    assert [run.run is None for run in runs] == [True, True, False]
    assert "was deleted" in runs[0].try_update()
    assert runs[1].try_update() != ""
    blocked.manifest_lock.rmdir()
    assert runs[1].try_update() == ""
    assert_mirrored(blocked, "FINISHED")
    assert_mirrored(fine, "KILLED")


def test_short_runs_of_databases_are_grouped(tmp_path: Path) -> None:
    runs = [MlflowRun.of(make_run(tmp_path, f"run{number}")) for number in range(45)]
    assert [len(group) for group in batch.groups(runs)] == [20, 20, 5]
    for run in runs[:4]:
        run.rundir.metrics.write_text("x" * 40_000)
    runs[4].rundir.metrics.write_text("x" * 200_000)
    assert [len(group) for group in batch.groups(runs[:6])] == [2, 3], "long runs one by one"
    server = MlflowRun.of(make_run(tmp_path, "server", uri="http://host:5000"))
    assert list(batch.groups([server])) == []
