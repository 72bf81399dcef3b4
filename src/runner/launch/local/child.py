"""What a process forked from the queue becomes: one that owes the terminal nothing and works on one run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from runner.launch.local.slots import Slot
from runner.tracking.rundir import RunDir


def become(rundir: RunDir, slot: Slot, start: Callable[[RunDir], int], signals: Iterable[int]) -> NoReturn:
    """Work on the run in this process, which was forked for it, and end with its exit code.

    ``signals`` are blocked, and stay so until ``start`` can honour them; only a hangup finds it deaf from now on.
    """
    code = 1
    try:
        os.setsid()
        _leave_terminal(rundir)
        for number in signals:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        _keep_to(slot)
        if slot.gpus:
            rundir.update_manifest(gpus=",".join(slot.gpus))
        code = start(rundir)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk
                stream.flush()
        os._exit(code)


def kill_session(leader: int) -> None:
    """Kill a process that ``become`` has made the leader of a session, and all that it has started in it."""
    for pid in [leader, *others_of(leader)]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def others_of(leader: int) -> list[int]:
    """The processes of its session besides itself."""
    import psutil

    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if pid != leader and os.getsid(pid) == leader:
                found.append(pid)
    return found


def _leave_terminal(rundir: RunDir) -> None:
    """What would go to the terminal goes into a file of the run; there is nothing to read."""
    try:
        output = os.open(rundir.terminal_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:  # a full disk must not be what a run fails of
        output = os.open(os.devnull, os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)
    # The parent's may be anything by now, a notebook's for one.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _keep_to(slot: Slot) -> None:
    """Compute on the slot's threads and GPUs.

    Raises:
        RuntimeError: CUDA was touched before the fork, so that it cannot be used here.
    """
    os.environ["OMP_NUM_THREADS"] = str(slot.threads)
    if slot.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    if "torch" not in sys.modules:
        return
    import torch

    torch.set_num_threads(slot.threads)
    if slot.gpus and torch.cuda._is_in_bad_fork():
        raise RuntimeError("CUDA was initialised before this process was forked: a fault of runner's queue")
