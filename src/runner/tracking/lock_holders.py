"""The local processes that hold the locks of run and sweep folders, found by their open files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from runner.errors import DamagedError
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


def has_queue(sweep: SweepDir) -> bool | None:
    """Whether a local queue runs the sweep; None if no local queue ever did.

    Workers forked by a queue inherit its lock and may outlive the queue: a lock held by workers only does not count.
    """
    if not sweep.queue_lock.exists():
        return None
    if not sweep.is_worked_on():
        return False
    holders = [files for _, files in _open_files() if _is_open(sweep.queue_lock, files)]
    worker_lock = RunDir(sweep.path).lock.name
    return not holders or any(worker_lock not in map(os.path.basename, files) for files in holders)


def holder(rundir: RunDir) -> int | None:
    """Pid of the local process that holds the folder; None if there is none, or it belongs to another user.

    The pid in state.json may have been reused by another process: so this checks which process has the lock file open.
    """
    if not rundir.is_alive():
        return None
    recorded: list[int] = []
    with contextlib.suppress(DamagedError):
        recorded = [rundir.read_state().pid]  # checked first: a scan of all processes is slow
    holders = (pid for pids in (recorded, None) for pid, files in _open_files(pids) if _is_open(rundir.lock, files))
    return next(holders, None)


def _open_files(pids: Iterable[int] | None = None) -> Iterator[tuple[int, list[str]]]:
    """(pid, open files) of these local processes, by default all; processes of other users are skipped."""
    import psutil

    for pid in psutil.pids() if pids is None else pids:
        if pid and pid != os.getpid():
            with contextlib.suppress(psutil.Error, OSError):
                yield pid, [opened.path for opened in psutil.Process(pid).open_files()]


def _is_open(path: Path, files: Iterable[str]) -> bool:
    same_name = [file for file in files if os.path.basename(file) == path.name]
    return any(os.path.samefile(file, path) for file in same_name if os.path.exists(file))
