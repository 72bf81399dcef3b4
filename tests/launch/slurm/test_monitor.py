"""Jobs are followed to their end."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import TINY, option, prepared
from fixtures.slurm_runs import SHORT, SLURM, mlflow_runs, runner
from fixtures.web_servers import Web, web
from submitit.local.local import start_controller

from runner.errors import LaunchError
from runner.launch.slurm import monitor, submission
from runner.tracking import slurm_client, slurm_commands, webhook
from runner.tracking.rundir import RunDir
from runner.tracking.slurm_client import Job
from runner.tracking.sweepdir import SweepDir, slurm_room


@pytest.mark.slurm
@pytest.mark.slow
def test_a_search_goes_on_as_jobs_end(slurm: None, web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    words = ("-m", *SHORT, *SLURM, "search=random", "search.trials=3", "optim.learning_rate=interval(1e-4,1e-2)")
    refused = runner(*words)
    assert refused.returncode == 2
    assert not list(Path().iterdir())
    assert "set it, for example search.at_once=8" in refused.stderr
    done = runner(*words, "search.at_once=2", "sweep=found")
    assert done.returncode == 0, done.stderr
    rundirs = SweepDir(Path("outputs/sweeps/found").absolute()).rundirs()
    assert [rundir.read_state().status for rundir in rundirs] == ["completed"] * 3
    losses = [rundir.read_state().summary["eval/loss"] for rundir in rundirs]
    assert f"best     eval/loss {min(losses):.6g}" in done.stdout
    runs = mlflow_runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == len(runs) - 1 == 3
    (message,) = [each for each in web.messages if each["kind"] == "sweep"]
    assert (message["sweep"], message["counts"], message["loss"]) == ("found", {"completed": 3}, min(losses))


def supervised(folder: Path) -> tuple[RunDir, subprocess.Popen[bytes]]:
    """A run that a process other than this one sees to; it is what submitit's local cluster looks like."""
    rundir = prepared(folder, *TINY)
    slurm_room(folder).mkdir()
    process = start_controller(slurm_room(folder), "sleep 60")
    rundir.update_manifest(slurm={"job_id": str(process.pid), "cluster": "local"})
    return rundir, process


class One:
    """Proposes this run; see launch/launcher.py: Source."""

    def __init__(self, rundir: RunDir) -> None:
        self.left, self.has_ended = [rundir], False

    def next(self) -> RunDir | None:
        return self.left.pop() if self.left else None

    def ended(self, rundir: RunDir) -> None:  # noqa: ARG002
        self.has_ended = True

    def poll(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_search_does_not_follow_a_job_that_it_did_not_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its earlier job does not leave its nodes: an end of that one would be taken for this one's."""
    rundir, sweep = prepared(tmp_path / "run", *TINY), SweepDir(tmp_path)
    rundir.update_manifest(slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm"})
    rundir.write_state(status="failed")
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: {ref: Job(ref.id, "COMPLETING") for ref in refs})
    monkeypatch.setattr(slurm_commands, "settings", lambda *_: {})
    monkeypatch.setattr(submission, "LONGEST_LEAVE_S", -1.0)
    source = One(rundir)
    with pytest.raises(LaunchError, match="launcher=run: not submitted: the run's earlier job has not left its nodes"):
        option("launcher", "slurm")().serve(source, sweep, 1)
    assert not source.has_ended


def test_a_job_that_does_not_leave_keeps_no_other_run_of_a_search_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Two:
        """Proposes two runs, and hears of ends."""

        total = 2

        def __init__(self) -> None:
            self.left, self.ended_runs = [RunDir(tmp_path / name) for name in ("well", "stuck")], []

        def next(self) -> RunDir | None:
            return self.left.pop() if self.left else None

        def ended(self, rundir: RunDir) -> None:
            self.ended_runs.append(rundir.path.name)

        def poll(self) -> None:
            pass

    asked: list[str] = []

    def submit(rundir: RunDir) -> list[RunDir]:
        asked.append(rundir.path.name)
        return [rundir] if rundir.path.name == "stuck" else []

    monkeypatch.setattr(submission, "is_queued", lambda rundirs: [False] * len(rundirs))
    monkeypatch.setattr(monitor, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(monitor, "SETTLING_S", 0.0)
    source = Two()
    with pytest.raises(LaunchError, match="launcher=stuck: not submitted: the run's earlier job"):
        monitor.serve(source, 1, submit)
    assert asked == ["stuck", "well", "stuck"], "and once more after a job has ended"
    assert source.ended_runs == ["well"]


def test_sigterm_ends_the_following_and_not_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rundir, process = supervised(tmp_path / "run")
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert monitor.follow([rundir]) == [75]
        assert "stopped following; 1 of 1 runs are still active" in capsys.readouterr().err
        source = One(rundir)
        assert monitor.serve(source, 1, lambda _: []) == 75
        assert "stopped the search; 1 runs are still active" in capsys.readouterr().err
        assert not source.has_ended
        assert process.poll() is None
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    assert signal.getsignal(signal.SIGTERM) is before
