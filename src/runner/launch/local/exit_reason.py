"""What is said of a process that a signal ended: in the run's state, and as an exit code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runner.tracking.rundir import Status

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
BY_KILL = "killed by SIGKILL"


class Death(NamedTuple):
    """How a run ended, in the words of its state."""

    status: Status
    reason: str
    code: int


def by_signal(number: int, *, out_of_memory: bool) -> Death:
    """The death by signal ``number``; ``out_of_memory`` says that the kernel's OOM killer was at work meanwhile."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return Death("killed", BY_KILL + " (out of memory: the kernel's OOM killer)" * out_of_memory, 1)
    if number in CRASHES:
        return Death("failed", f"crashed ({name})", 1)
    if number == signal.SIGTERM:  # in the instant before its worker could listen
        return Death("preempted", "stopped by SIGTERM; nothing was trained yet", 75)
    if number == signal.SIGINT:
        return Death("killed", "interrupted; nothing was trained yet", 130)
    return Death("killed", f"killed by {name}", 1)


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of our memory cgroup the kernel has killed for want of memory; of the machine without one.

    ``memory.events`` of cgroup v2, ``memory.oom_control`` of v1, else /proc/vmstat. The counter of the cgroup counts
    kills on a machine that is out of memory as well, and none of a neighbour's.
    """
    for path in _counters(root):
        with contextlib.suppress(OSError, ValueError):
            words = (line.split() for line in path.read_text().splitlines())
            found = [int(line[1]) for line in words if line[:1] == ["oom_kill"]]
            if found:
                return found[0]
    return 0


def _counters(root: Path) -> Iterator[Path]:
    mounts = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = (mounts / "memory", "memory.oom_control") if controllers else (mounts, "memory.events")
            yield top / path.lstrip("/") / name
            yield top / name  # in a container without a cgroup namespace our own lies at the top
    yield root / "proc/vmstat"
