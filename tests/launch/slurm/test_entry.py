"""A task of Slurm: its rank, and whether its job is queued again."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, prepared

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
