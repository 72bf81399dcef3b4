"""A task of Slurm: its rank, and whether its job is queued again."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, prepared
from submitit import JobEnvironment

from runner.launch.slurm import entry
from runner.tracking import slurm_client, slurm_commands


@pytest.mark.parametrize(("has_advanced", "requeues"), [(True, ["7"]), (False, [])])
def test_a_job_that_slurm_ends_without_a_warning_at_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_advanced: bool, requeues: list[str]
):
    """Slurm looks at time limits once a minute: the warning may come before the job can receive it."""
    answer = "JobId=7 JobName=x JobState=COMPLETING Reason=TimeLimit Restarts=2 ExitCode=0:15"
    requeued: list[str] = []
    monkeypatch.setattr(slurm_commands, "lines", lambda command: [answer] if command[0] == "scontrol" else ["INVALID"])
    monkeypatch.setattr(slurm_client, "requeue", requeued.append)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert slurm_client.fate("7", restarts=2) == "time limit"
    rundir = prepared(tmp_path / "run", *TINY)
    rundir.write_state(status="preempted", reason="stopped by SIGTERM")
    submission = {"max_requeues": 9, "signal_delay_s": 120}
    assert entry._after_stop(rundir, submission, has_advanced=has_advanced) == 75
    assert requeued == requeues
    assert ("the time limit leaves no time to train" in rundir.read_state().reason) is not has_advanced


def test_the_variables_of_a_rank_come_from_its_task(monkeypatch: pytest.MonkeyPatch):
    task = {"JOB_ID": "7", "NTASKS": "4", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[3-4]", "PROCID": "3",
            "LOCALID": "1", "NODEID": "1"}  # fmt: skip
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    found = entry.rank_environment(JobEnvironment())
    port = found.pop("MASTER_PORT")
    assert found == {
        "MASTER_ADDR": "n3", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert entry.rank_environment(JobEnvironment())["MASTER_PORT"] == port, "the ranks of a start meet at one port"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert entry.rank_environment(JobEnvironment())["MASTER_PORT"] != port, "the last one may still be in use"
    assert 20000 <= int(port) < 32000
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert entry.rank_environment(JobEnvironment())["MASTER_ADDR"] == "127.0.0.1"
