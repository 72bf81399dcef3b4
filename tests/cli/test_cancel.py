"""cancel against real workers, a real queue and a real kill -9."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import until
from fixtures.run_folders import (
    ENDLESS,
    MIRRORED,
    SWEEP,
    _in_a_new_folder,
    holding,
    mlflow_status,
    played,
    processes,
    said_of,
    statuses,
)

from runner.tracking import lock_holders, machine, run_status
from runner.tracking.state_file import DIED
from runner.tracking.sweepdir import SweepDir


def test_the_process_that_holds_the_folder_gets_the_signal_whatever_pid_is_in_the_state(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    stranger = subprocess.Popen(["sleep", "100"], text=True)
    processes.append(stranger)
    rundir = played("a/1", "running")
    worker = holding(rundir, processes)
    rundir.write_state(pid=stranger.pid)
    assert lock_holders.holder(rundir) == worker.pid
    code, out, _ = said_of("cancel", "a/1", capsys=capsys)
    assert code == 0
    assert worker.wait() == 130
    assert stranger.poll() is None
    assert f"cancelled by {machine.user()}@" in out
    assert rundir.read_state().status == "killed"


def test_a_recycled_pid_is_never_signalled(processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]):
    stranger = subprocess.Popen(["sleep", "100"], text=True)
    processes.append(stranger)
    rundir = played("a/1", "running")
    rundir.write_state(pid=stranger.pid)
    assert lock_holders.holder(rundir) is None
    code, out, _ = said_of("cancel", "a/1", capsys=capsys)
    assert (code, stranger.poll()) == (0, None)
    assert "nothing to cancel, the run is killed" in out
    assert rundir.read_state().reason == DIED


def test_what_is_over_is_left_as_it_is(capsys: pytest.CaptureFixture[str]):
    runs = [played(f"a/{status}", status) for status in ("completed", "failed", "killed")]
    before = [rundir.state.read_bytes() for rundir in runs]
    for rundir in runs:
        code, out, _ = said_of("cancel", str(rundir.path), capsys=capsys)
        assert code == 0
        assert f"nothing to cancel, the run is {rundir.read_state().status}" in out
        assert not rundir.cancel_request.exists()
    assert [rundir.state.read_bytes() for rundir in runs] == before


def test_a_preempted_run_that_nobody_wants_any_more_is_killed(capsys: pytest.CaptureFixture[str]):
    rundir = played("a/1", "preempted")
    assert said_of("cancel", "a/1", capsys=capsys)[0] == 0
    assert rundir.read_state().status == "killed"


def started_sweep(processes: list[subprocess.Popen[str]]) -> SweepDir:
    """A real queue of four runs, the first of them at its first steps."""
    command = [sys.executable, "-m", "runner", "-m", *SWEEP, *MIRRORED, *ENDLESS, "sweep=seeds", "seed=1,2,3,4"]
    with Path("queue").open("w") as output:
        processes.append(subprocess.Popen(command, stdout=output, stderr=output, text=True))
    sweep = SweepDir(Path("outputs/sweeps/seeds").absolute())
    until(lambda: sweep.manifest.exists() and sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 3)
    return sweep


def test_cancelling_runs_of_a_queue_and_then_all_of_it(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    sweep = started_sweep(processes)
    one, two, three, four = sweep.rundirs()
    found = statuses(capsys)
    assert [run["status"] for run in found.values()] == ["running", "queued", "queued", "queued"]
    assert re.search(r"seeds/ +1 running, 3 queued", said_of("status", capsys=capsys)[1])

    assert said_of("cancel", "seeds/seed=3", capsys=capsys)[0] == 0
    assert three.read_state().status == "killed"
    assert three.read_state().reason.startswith("cancelled before it started by ")
    assert one.read_state().status == "running"

    assert said_of("cancel", "seeds/seed=1", capsys=capsys)[0] == 0
    assert one.read_state().status == "killed"
    assert "the state is saved at step" in one.read_state().reason
    until(lambda: two.read_state().status == "running")  # the queue goes on, past the third

    code, out, _ = said_of("cancel", "seeds", capsys=capsys)
    assert code == 0
    assert "nothing to cancel: 2 runs have ended already (2 killed)" in out
    assert processes[0].wait() == 1, "none is completed, and the queue itself was not stopped"
    assert [rundir.read_state().status for rundir in sweep.rundirs()] == ["killed"] * 4
    assert [rundir.read_state().attempt for rundir in sweep.rundirs()] == [1, 1, 0, 0]
    assert four.read_state().reason.startswith("cancelled before it started by ")
    said_of("status", "seeds", capsys=capsys)  # tells what nobody else did
    until(lambda: {mlflow_status(rundir) for rundir in sweep.rundirs()} == {"KILLED"})


def test_a_queue_that_died_and_its_worker_that_did_not(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    sweep = started_sweep(processes)
    first = sweep.rundirs()[0]
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    found = list(statuses(capsys, "seeds").values())
    assert [run["status"] for run in found] == ["running", "pending", "pending", "pending"]
    assert {run["reason"] for run in found[1:]} == {run_status.NOBODY}
    os.kill(first.read_state().pid, signal.SIGKILL)
    until(lambda: not first.is_alive())
    _, out, _ = said_of("status", capsys=capsys)
    assert re.search(r"seeds/ +3 pending, 1 killed", out)
    assert "no process will start 3 of these runs: repeat the command: python -m runner -m " in out
    assert first.read_state().reason == DIED
    assert said_of("cancel", "seeds", capsys=capsys)[0] == 0
    assert {rundir.read_state().status for rundir in sweep.rundirs()} == {"killed"}
