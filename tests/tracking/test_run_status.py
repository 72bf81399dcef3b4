"""How a run stands: its folder against its lock and Slurm."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from typing import NoReturn

import pytest
from fixtures.run_folders import _in_a_new_folder, played, submitted

from runner.errors import Fault, LaunchError
from runner.files import write_atomic
from runner.tracking import run_status, slurm_client, slurm_commands
from runner.tracking.state_file import DIED


@pytest.mark.parametrize(
    ("job", "status", "reason"),
    [
        (slurm_client.Job("7", "PENDING", "BeginTime"), "requeued", "Slurm: BeginTime"),
        (slurm_client.Job("7", "OUT_OF_MEMORY", signal=9), "failed", "Slurm: OUT_OF_MEMORY, signal 9"),
        (slurm_client.Job("7", "NODE_FAIL", nodes="n1"), "killed", "Slurm: NODE_FAIL, on n1"),
        (slurm_client.Job("7", "CANCELLED", is_guess=True), "killed", DIED),
    ],
)
def test_the_reason_of_a_killed_worker_comes_from_slurm(
    job: slurm_client.Job, status: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    rundir = played("run", "killed", slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm", "submitted": 1.0})
    rundir.write_state(reason=DIED, attempt=1)
    monkeypatch.setattr(slurm_commands, "silence", lambda: "")
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: dict.fromkeys(refs, job))
    [found] = run_status.of([rundir])
    assert (found.status, found.reason) == (status, reason)
    assert rundir.read_state().status == ("killed" if status == "requeued" else status)


def test_an_unrecorded_job_is_found_by_the_state_of_its_worker(monkeypatch: pytest.MonkeyPatch):
    rundir = played("run", "running")
    rundir.write_state(host="n7", scheduler_id="7")
    monkeypatch.setattr(slurm_commands, "silence", lambda: "")
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: {ref: slurm_client.Job(ref.id, "RUNNING") for ref in refs})
    assert run_status.of([rundir])[0].status == "running"


def test_slurm_that_answers_a_ping_alone_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    questions = []

    def hang(of: object) -> NoReturn:
        questions.append(of)
        raise LaunchError(Fault("", "squeue: no answer within 60 s"))

    for attribute in ("named", "jobs"):
        monkeypatch.setattr(slurm_client, attribute, hang)
    monkeypatch.setattr(slurm_commands, "silence", lambda: "")
    rundirs = [played(name, "pending") for name in ("a", "b")]
    for rundir in rundirs:
        note = {"name": rundir.path.name, "job_id": None, "cluster": "slurm", "folders": [str(rundir.path)]}
        write_atomic(rundir.path / "slurm" / "runner-x.json", json.dumps(note))
    noted = played("c", "pending", slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm", "submitted": 1.0})
    assert run_status.of([*rundirs, noted])[2].status == "unknown"
    assert questions == ["a"]
    assert caplog.text.count("Slurm does not answer") == 1
