"""Status, reason and exit code of a run whose process was ended by a signal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runner.signals import SIGNALS
from runner.tracking.state_file import Status

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class Death(NamedTuple):
    """How a process ended: status and reason for state.json, and the exit code."""

    status: Status
    reason: str
    code: int


def by_signal(number: int, *, out_of_memory: bool) -> Death:
    """Outcome of a process ended by signal ``number``. ``out_of_memory``: the kernel's OOM killer killed a process."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return Death("killed", "killed by SIGKILL" + " (out of memory: the kernel's OOM killer)" * out_of_memory, 1)
    if number in CRASHES:
        return Death("failed", f"crashed ({name})", 1)
    if number == signal.SIGINT:  # before the worker had installed its signal handler
        return Death("killed", "interrupted; nothing was trained yet", 130)
    if number in SIGNALS:
        return Death("preempted", f"stopped by {name}; nothing was trained yet", 75)
    return Death("killed", f"killed by {name}", 1)


def oom_kills(root: Path = Path("/")) -> int:
    """Number of processes that the OOM killer has killed in our memory cgroup; without cgroups, on this machine.

    Read from ``memory.events`` (cgroup v2), ``memory.oom_control`` (v1), else /proc/vmstat. The cgroup's counter
    includes kills because the whole machine is out of memory, but not those of other cgroups.
    """
    for path in _counters(root):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _counters(root: Path) -> Iterator[Path]:
    """Files that may contain the counter, the most specific first."""
    mounts = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = (mounts / "memory", "memory.oom_control") if controllers else (mounts, "memory.events")
            yield top / path.lstrip("/") / name
            yield top / name  # in a container without a cgroup namespace
    yield root / "proc/vmstat"
