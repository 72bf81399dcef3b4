"""Child process of the local queue: detach from the terminal, then train one run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from runner import streams
from runner.launch.local.slots import Slot
from runner.signals import restore_defaults
from runner.tracking.rundir import RunDir


def become(rundir: RunDir, slot: Slot, start: Callable[[RunDir], int]) -> NoReturn:
    """Train the run in this forked process, then exit with its exit code.

    Stop signals are blocked on entry; ``start`` unblocks them when it can handle them. SIGHUP is ignored from now on.
    """
    code = 1
    try:
        os.setsid()
        _leave_terminal(rundir)
        restore_defaults()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _use(slot)
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
    """Send SIGKILL to a child process and to every process of its session, such as ranks and data workers."""
    for pid in [leader, *others_of(leader)]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def others_of(leader: int) -> list[int]:
    """The other processes of the session of ``leader``."""
    import psutil

    others = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if pid != leader and os.getsid(pid) == leader:
                others.append(pid)
    return others


def _leave_terminal(rundir: RunDir) -> None:
    """Redirect stdout and stderr to the run's terminal.log, and stdin to /dev/null."""
    streams.let_go()
    try:
        output = os.open(rundir.terminal_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:  # a full disk must not stop the run
        output = os.open(os.devnull, os.O_WRONLY)
    empty = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((empty, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(empty)
    # The parent may have replaced sys.stdout and sys.stderr, as a notebook does.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _use(slot: Slot) -> None:
    """Limit this process to the slot's threads and GPUs.

    Raises:
        RuntimeError: CUDA was initialized before the fork and cannot be used in this process.
    """
    os.environ["OMP_NUM_THREADS"] = str(slot.threads)
    slot.enter()
    if "torch" not in sys.modules:
        return
    import torch

    torch.set_num_threads(slot.threads)
    if slot.gpus and torch.cuda._is_in_bad_fork():
        raise RuntimeError("CUDA was initialized before this process was forked: a bug in runner's queue")
