"""Signals at each moment of a run, and terminals that go away: what was trained is saved, and the run goes on."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, prepared, until

from runner.errors import Preempted
from runner.signals import ONE_GESTURE_S, Stop
from runner.tracking.rundir import RunDir

SERVER = Path(__file__).parent / "stop_server.py"
OPTIONS = (*TINY, "train.max_steps=6", "train.eval_steps=3", "train.save_steps=5", "lora.lora_dropout=0.2")
TERM, HUP, INT, USR1, USR2 = signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2


def weights(rundir: RunDir) -> bytes:
    return (rundir.model / "adapter_model.safetensors").read_bytes()


def trained(rundir: RunDir) -> int:
    command = [sys.executable, "-m", "runner.worker", str(rundir.path)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> bytes:
    """The weights of the run that nothing disturbs."""
    rundir = prepared(tmp_path_factory.mktemp("undisturbed") / "run", *OPTIONS)
    assert trained(rundir) == 0
    return weights(rundir)


def stopped(tmp_path: Path, number: int, moment: str, *more: str) -> tuple[RunDir, int, str]:
    rundir = prepared(tmp_path / "run", *OPTIONS)
    command = [sys.executable, str(SERVER), str(int(number)), moment, str(rundir.path), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return rundir, done.returncode, done.stdout + done.stderr


def check_stopped(tmp_path: Path, expected: bytes, number: int, moment: str, step: int) -> None:
    rundir, code, output = stopped(tmp_path, number, moment)
    state, name = rundir.read_state(), signal.Signals(number).name
    how = ("killed", "interrupted", 130) if number == INT else ("preempted", f"stopped by {name}", 75)
    saved = f"the state is saved at step {step}" if step else "nothing was trained yet"
    assert (state.status, state.reason, code) == (how[0], f"{how[1]}; {saved}", how[2]), output
    assert rundir.saved_step() == step
    assert "Traceback" not in output
    assert trained(rundir) == 0
    assert rundir.read_state().status == "completed"
    assert weights(rundir) == expected


@pytest.mark.parametrize("number", [HUP, USR1])
def test_a_closed_terminal_and_slurms_warning_save_as_sigterm_does(tmp_path: Path, expected: bytes, number: int):
    check_stopped(tmp_path, expected, number, "later step", 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, INT, USR2])
def test_every_other_signal_saves_between_two_steps(tmp_path: Path, expected: bytes, number: int):
    check_stopped(tmp_path, expected, number, "later step", 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("tokenizing", 0), ("loading", 0), ("first step", 1), ("first evaluation", 0), ("later evaluation", 3),
        ("saving", 5), ("the end", 6),
    ],
)  # fmt: skip
def test_a_signal_at_any_moment(tmp_path: Path, expected: bytes, moment: str, step: int):
    check_stopped(tmp_path, expected, TERM, moment, step)


@pytest.mark.slow
def test_a_run_that_has_ended_stays_so(tmp_path: Path, expected: bytes):
    rundir, code, _ = stopped(tmp_path, TERM, "printing the result")
    assert (code, rundir.read_state().status, weights(rundir)) == (0, "completed", expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [HUP, USR1])
def test_what_is_ignored_from_the_start_stays_ignored(tmp_path: Path, expected: bytes, number: int):
    """``nohup python -m runner …``"""
    rundir, code, _ = stopped(tmp_path, number, "later step", "ignored")
    assert (code, rundir.read_state().status, weights(rundir)) == (0, "completed", expected)


def completes(tmp_path: Path, expected: bytes, **streams: Any) -> None:
    rundir = prepared(tmp_path / "run", *OPTIONS)
    command = [sys.executable, "-m", "runner", f"resume={rundir.path}"]
    process = subprocess.Popen(command, cwd=tmp_path, **streams)
    for stream in streams.values():
        os.close(stream)
    assert process.wait() == 0
    assert (rundir.read_state().status, weights(rundir)) == ("completed", expected)


def test_a_run_whose_reader_has_left_goes_on(tmp_path: Path, expected: bytes):
    read, write = os.pipe()
    os.close(read)
    completes(tmp_path, expected, stdout=write, stderr=os.dup(write))


@pytest.mark.slow
def test_a_run_on_a_stopped_terminal_goes_on(tmp_path: Path, expected: bytes):
    """Ctrl-S."""
    ours, theirs = pty.openpty()
    termios.tcflow(theirs, termios.TCOOFF)
    completes(tmp_path, expected, stdout=theirs, stderr=os.dup(theirs))
    os.close(ours)


@pytest.mark.slow
def test_a_run_with_a_full_disk_behind_its_output_goes_on(tmp_path: Path, expected: bytes):
    full = os.open("/dev/full", os.O_WRONLY)
    completes(tmp_path, expected, stdout=full, stderr=os.dup(full))


@pytest.mark.slow
def test_a_run_on_a_terminal_that_was_closed_goes_on_if_nothing_hangs_it_up(tmp_path: Path, expected: bytes):
    ours, theirs = pty.openpty()
    os.close(ours)
    completes(tmp_path, expected, stdout=theirs, stderr=os.dup(theirs))


@pytest.mark.slow
def test_a_run_with_closed_streams_goes_on(tmp_path: Path, expected: bytes):
    rundir = prepared(tmp_path / "run", *OPTIONS)
    command = f"exec '{sys.executable}' -m runner resume='{rundir.path}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert (rundir.read_state().status, weights(rundir)) == ("completed", expected)


@pytest.mark.slow
def test_a_terminal_that_is_hung_up_lets_the_run_save(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=5000")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(HUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "runner", f"resume={rundir.path}"])
    until(lambda: rundir.read_state().step > 1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    state = rundir.read_state()
    assert (state.status, state.reason.partition(";")[0]) == ("preempted", "stopped by SIGHUP")
    assert rundir.saved_step() == state.step


@pytest.mark.slow
def test_a_sweep_whose_reader_has_left_goes_on(tmp_path: Path, cache: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "runner", "-m", *TINY, "train.max_steps=1", "seed=1,2", "sweep=s"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=write, stderr=write)
    os.close(write)
    assert process.wait() == 0
    states = [RunDir(path.parent).read_state().status for path in tmp_path.glob("outputs/sweeps/s/*/state.json")]
    assert states == ["completed"] * 2


def test_a_stopped_run_does_not_wait_for_its_upload(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from runner.tracking.mirror import spawn
    from runner.train import build, worker

    rundir = prepared(tmp_path / "run", *OPTIONS)
    with subprocess.Popen(["sleep", "1000"]) as upload:
        monkeypatch.setattr(spawn, "start_mirror", lambda *_: upload)
        monkeypatch.setattr(spawn, "AFTER_A_STOP_S", 0.0)
        monkeypatch.setattr(build, "parts", lambda *_: os.kill(os.getpid(), TERM))
        assert worker.work(rundir) == 75
        assert upload.poll() is None, "the upload goes on"
        upload.kill()
    assert f"run      {rundir.path}  preempted: stopped by SIGTERM; nothing was trained yet" in capfd.readouterr().out


def test_a_second_interrupt_waits_for_nothing():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, from the terminal and from a launcher
        time.sleep(1.2 * ONE_GESTURE_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may send several: the last word counts
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            stop.check()
        os.kill(os.getpid(), signal.SIGUSR2)  # Slurm's warning
        with pytest.raises(Preempted, match="SIGUSR2"):
            stop.check()
        with pytest.raises(Preempted), stop.at_once():
            raise AssertionError("asked to stop before the block")
