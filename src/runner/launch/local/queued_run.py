"""One run in the queue of this machine: its lock, its cancel request, and how another process has ended it."""

from __future__ import annotations

import contextlib
import fcntl
from dataclasses import dataclass, field
from typing import IO

from runner.files import stamp
from runner.launch.local.slots import Slot
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.train import outcome


@dataclass
class QueuedRun:
    """One run in the queue."""

    number: int
    rundir: RunDir
    known: State = field(default_factory=State)
    """State when the run was added to the queue; later, when its process was forked."""
    old_cancel: tuple[int, ...] = ()
    """``stamp`` of a cancel request from before the run was added to the queue; it is ignored."""
    lock: IO[str] | None = None
    slot: Slot | None = None
    code: int | None = None

    def __post_init__(self) -> None:
        self.known, self.old_cancel = self.rundir.read_state(), stamp(self.rundir.cancel_request)

    def acquire(self) -> bool:
        """Lock the run for this queue; False if another queue or a worker holds it."""
        try:
            self.lock = self.rundir.queue_lock.open("a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError:  # full disk, or the folder was removed: the worker reports it
            self.release()
        if self.rundir.is_alive():
            self.release()
            return False
        return True

    def release(self) -> None:
        if self.lock:
            self.lock.close()
        self.lock = None

    def is_cancelled(self) -> bool:
        return stamp(self.rundir.cancel_request) not in ((), self.old_cancel)

    def forget_cancel(self) -> None:
        """Remove a cancel request from before the run was added: the worker would obey it."""
        if not self.is_cancelled():
            with contextlib.suppress(OSError):
                self.rundir.cancel_request.unlink(missing_ok=True)

    def outcome(self) -> State | None:
        """State of a run that another process has finished since it was added; None if it still has to be trained."""
        state, known = self.rundir.read_state(), self.known
        another_attempt = state.attempt != known.attempt
        if another_attempt and not state.reason.startswith("cancelled") and outcome.exit_code(state) in (75, 130):
            return None  # the other queue was stopped, this one was not
        if state.status == "completed" or (state.status != "pending" and another_attempt):
            return state
        return state if state.status in ("failed", "preempted", "pruned") and state.updated != known.updated else None
