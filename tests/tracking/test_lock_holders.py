"""Which process has a folder, whatever state.json says."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.tracking import lock_holders
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


@contextlib.contextmanager
def process(*locks: Path) -> Iterator[int]:
    """The pid of a process that holds these locks: that of a queue is shared."""
    ready, write = os.pipe()
    if not (pid := os.fork()):
        try:
            signal.alarm(60)  # it never outlives the tests
            for lock in locks:
                lock.parent.mkdir(parents=True, exist_ok=True)
                mode = fcntl.LOCK_SH if lock.name == ".queue.lock" else fcntl.LOCK_EX
                fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT), mode)
            os.write(write, b"!")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.read(ready, 1)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(write)


@pytest.mark.unmeasured
def test_the_holder_is_the_process_with_the_open_file(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run")
    rundir.write_state(status="running", pid=os.getppid())
    assert lock_holders.holder(rundir) is None, "nobody holds it: another process has the pid now"
    with process(rundir.lock) as pid:
        assert lock_holders.holder(rundir) == pid
        rundir.write_state(pid=pid)
        assert lock_holders.holder(rundir) == pid
        rundir.state.write_text("{")
        assert lock_holders.holder(rundir) == pid, "a damaged state is no reason not to find it"
    assert lock_holders.holder(rundir) is None


@pytest.mark.unmeasured
def test_workers_that_outlive_their_queue_are_no_queue(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path)
    worker_lock = RunDir(tmp_path / "000").lock
    assert lock_holders.has_queue(sweep) is None
    with process(sweep.queue_lock):
        assert lock_holders.has_queue(sweep) is True
        with process(sweep.queue_lock, worker_lock):
            assert lock_holders.has_queue(sweep) is True
    with process(sweep.queue_lock, worker_lock):
        assert lock_holders.has_queue(sweep) is False
    assert lock_holders.has_queue(sweep) is False
