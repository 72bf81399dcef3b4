"""The process that trains one run of the queue, forked for real."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.launch.local import child
from runner.launch.local.slots import Slot
from runner.signals import signals_to
from runner.tracking.rundir import RunDir


def ended(rundir: RunDir, slot: Slot, start: Callable[[RunDir], int]) -> int:
    """The exit code of a child that trains the run like this."""
    if not (pid := os.fork()):
        child.become(rundir, slot, start)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_child_leaves_the_terminal_and_ends_with_the_code_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # another test may have asked it for GPUs
    rundir = RunDir(tmp_path)

    def start(_: RunDir) -> int:
        print("own session", os.getsid(0) == os.getpid())
        print("SIGHUP ignored", signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
        print("SIGTERM", signal.getsignal(signal.SIGTERM).name)
        print(os.environ["OMP_NUM_THREADS"], "threads, GPU", os.environ["CUDA_VISIBLE_DEVICES"], os.isatty(0))
        return 7

    with signals_to(lambda *_: None):  # as a queue handles them, and its runs must not
        assert ended(rundir, Slot(3, ("1", "2")), start) == 7
    assert rundir.terminal_log.read_text().splitlines() == [
        "own session True", "SIGHUP ignored True", "SIGTERM SIG_DFL", "3 threads, GPU 1,2 False",
    ]  # fmt: skip
    assert rundir.read_manifest()["gpus"] == "1,2"


def test_an_error_is_in_the_log_of_the_run(tmp_path: Path) -> None:
    def start(_: RunDir) -> int:
        raise ValueError("no such thing")

    assert ended(RunDir(tmp_path), Slot(1), start) == 1
    log = RunDir(tmp_path).terminal_log.read_text()
    assert log.startswith("Traceback (most recent call last)")
    assert "ValueError: no such thing" in log
    assert "gpus" not in RunDir(tmp_path).read_manifest()


def test_a_session_is_killed_with_all_of_its_processes() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 900 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout
    sleeper = int(leader.stdout.readline())
    assert child.others_of(leader.pid) == [sleeper]
    child.kill_session(leader.pid)
    try:
        assert select.select([leader.stdout], [], [], 60)[0], "nobody has the pipe any more"
        assert leader.wait() == -signal.SIGKILL
    finally:
        leader.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(sleeper, signal.SIGKILL)
