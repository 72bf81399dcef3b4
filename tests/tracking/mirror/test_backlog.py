"""Which ended runs are not fully uploaded, read from their folders alone."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from runner.tracking.mirror import backlog
from runner.tracking.rundir import RunDir


def ended(folder: Path, **report: Any) -> RunDir:
    """A run that has ended, and what its upload process reports."""
    rundir = RunDir(folder)
    state = rundir.write_state(status="completed")
    rundir.update_manifest(tracking="mlflow")
    rundir.mirror_report.write_text(json.dumps({"uploaded": state.updated, "problem": "", "also": {}, **report}))
    return rundir


@pytest.mark.parametrize(
    "report", [{"problem": "no answer"}, {"also": {"tensorboard": "", "wandb": "no answer"}}, {"uploaded": 1.0}]
)
def test_a_run_is_behind_until_all_of_its_end_is_uploaded(tmp_path: Path, report: dict[str, Any]) -> None:
    done, behind = ended(tmp_path / "done"), ended(tmp_path / "behind", **report)
    assert (backlog.is_complete(done), backlog.is_behind(done)) == (True, False)
    assert (backlog.is_complete(behind), backlog.is_behind(behind)) == (False, True)
    done.write_state(summary={"eval/loss": 1.0})
    assert backlog.is_behind(done), "the state changed after the upload"
    assert backlog.upload_ended([]) == 0


def test_a_damaged_report_is_none(tmp_path: Path) -> None:
    rundir = ended(tmp_path / "run")
    for text in ("{", "[]", "{}", '{"also": 1}'):
        rundir.mirror_report.write_text(text)
        assert not backlog.is_complete(rundir), text


def test_what_a_process_is_uploading_is_not_behind(tmp_path: Path) -> None:
    rundir = ended(tmp_path / "run", problem="no answer")
    with rundir.mirror_lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert not backlog.is_behind(rundir)
    assert backlog.is_behind(rundir)


def test_a_run_without_a_store_is_never_uploaded_by_itself(tmp_path: Path) -> None:
    rundir = ended(tmp_path / "run", problem="no answer")
    rundir.update_manifest(tracking="offline")
    assert not backlog.is_wanted(rundir)
    assert not backlog.is_behind(rundir)
    rundir.update_manifest(mlflow={"run_id": "0" * 32})
    assert backlog.is_wanted(rundir), "sync has brought it to MLflow: what comes after belongs there, too"


def test_a_thousand_runs_are_one_command(tmp_path: Path) -> None:
    """Each command imports MLflow."""
    folders = [tmp_path / f"sweeps/many/{number:04d}-seed={number}" for number in range(1000)]
    assert [len(batch) for batch in backlog.commands(folders)] == [1000]
    many = list(backlog.commands(folders * 10))
    assert max(sum(map(len, batch)) + len(batch) for batch in many) <= backlog.LONGEST_COMMAND
    assert [folder for batch in many for folder in batch] == list(map(str, folders * 10))
    assert list(backlog.commands([])) == []
