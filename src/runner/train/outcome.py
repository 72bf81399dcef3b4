"""Record how an attempt at a run ended (stopped, refused, failed, rank lost) in state.json and in the log."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import traceback

from runner import terminal
from runner.errors import (
    LESS_MEMORY,
    Fault,
    Interrupted,
    Pruned,
    RunnerError,
    Stopped,
    TrainingError,
    shows_traceback,
    typed_line,
)
from runner.files import write_atomic
from runner.secrets import redact
from runner.tracking import recovery, slurm_client
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DIED, State
from runner.tracking.sweepdir import sweep_of
from runner.train.distributed.ranks import Ranks, lost_peer

OUT_OF_MEMORY = ("outofmemory", "out of memory", "can't allocate memory", "not enough memory")
CODES = {"completed": 0, "pruned": 0, "preempted": 75, "killed": 130}
"""Status → exit code; 1 for all others."""
LAST_WORDS_S = 5.0
"""How long to wait for another rank's error file, which may appear late on a shared file system."""
log = logging.getLogger("runner")


def exit_code(state: State) -> int:
    """The exit code for a state; status killed gives 130 if the user stopped the run, else 1."""
    if state.status == "killed" and not state.reason.startswith(("interrupted", "cancelled")):
        return 1
    return CODES.get(state.status, 1)


class Clock:
    """Training seconds including earlier attempts; does not run until ``start``."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._since: float | None = None
        self.parts = terminal.Stopwatch()
        """Of this attempt; loading included."""

    def start(self) -> None:
        self._since = time.monotonic()

    @property
    def is_started(self) -> bool:
        return self._since is not None

    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)


def clear(rundir: RunDir) -> None:
    """Remove the error files that the ranks of an earlier attempt wrote."""
    for path in rundir.path.glob(f"{rundir.rank_failure(0).name[:-1]}*"):
        path.unlink(missing_ok=True)


def refused(rundir: RunDir, clock: Clock, error: RunnerError) -> int:
    """Log an error before training started; state.json changes only if the run is unattended, or was killed before."""
    code = 1 if is_unattended(rundir) else 2
    if code == 1:
        note(rundir, clock, status="failed", reason=str(error))
    elif rundir.read_state().status == "running":  # an earlier attempt was killed by SIGKILL and could not record it
        note(rundir, clock, status="killed", reason=DIED)
    log.error(str(error), exc_info=error if shows_traceback() else None)
    return code


def is_unattended(rundir: RunDir) -> bool:
    """Whether the run belongs to a sweep or a Slurm job, so that nobody reads its terminal output."""
    return "SLURM_JOB_ID" in os.environ or sweep_of(rundir) is not None


def stopped(rundir: RunDir, clock: Clock, error: BaseException) -> int:
    """Record that the run was stopped: preempted, interrupted, cancelled or pruned; return the exit code."""
    stop = error if isinstance(error, Stopped) else Interrupted("interrupted twice")
    if rundir.cancel_request.exists():
        stop = Interrupted(rundir.cancel_request.read_text().strip() or "cancelled")
    elif stop.status == "preempted" and slurm_client.is_cancelled():
        stop = Interrupted("cancelled outside (scancel)")
    elif stop.status == "preempted" and rundir.prune_request.exists():  # a resumed run would be pruned at once
        stop = Pruned(rundir.prune_request.read_text())
    reason = f"{stop}; {_saved(rundir)}"
    note(rundir, clock, status=stop.status, reason=reason)
    log.info(reason, extra={"quiet": True})
    return stop.exit_code


def failed(rundir: RunDir, clock: Clock, error: Exception) -> int:
    """Log the error and record status failed; returns exit code 1."""
    error = explained(error)
    note(rundir, clock, status="failed", reason=typed_line(error))
    _log_error(rundir, error)
    return 1


def left_by_peer(rundir: RunDir, clock: Clock, ranks: Ranks, wait_s: float = LAST_WORDS_S) -> int:
    """Record that another rank died: its error is the run's reason; without an error the rank was killed."""
    words = last_words(rundir, ranks, wait_s)
    if words:
        note(rundir, clock, status="failed", reason=words.splitlines()[0])
        log.error(f"{words}\n    → the traceback is in {rundir.path}/train.rank-*.log")
    else:
        reason = f"one of the {ranks.world} ranks was killed (SIGKILL or out of memory); {_saved(rundir)}"
        note(rundir, clock, status="killed", reason=reason)
        log.error(reason)
    return 1


def last_words(rundir: RunDir, ranks: Ranks, wait_s: float) -> str:
    """The error of another rank, ``rank 1: …``; empty if no rank wrote one within ``wait_s`` seconds."""
    until = time.monotonic() + wait_s
    while ranks.world > 1:
        for rank in range(1, ranks.world):
            if rundir.rank_failure(rank).exists():
                return f"rank {rank}: {rundir.rank_failure(rank).read_text()}"
        if time.monotonic() >= until:
            break
        time.sleep(0.05)
    return ""


def failed_along(rundir: RunDir, ranks: Ranks, error: Exception) -> int:
    """End a rank other than 0: write its error to a file for rank 0; 0 if rank 0 has recorded the run's end already."""
    if lost_peer(error):
        log.warning(f"lost another rank: {typed_line(error)}")
        return 0 if _is_recorded(rundir) else 1
    error = explained(error)
    log.error("".join(traceback.format_exception(error)))
    with contextlib.suppress(OSError):
        write_atomic(rundir.rank_failure(ranks.rank), redact(typed_line(error)), is_durable=False)
    return 1


def note(rundir: RunDir, clock: Clock, *, status: str, reason: str) -> None:
    """Write status and reason to state.json; if that fails (disk full), the run counts as killed and can be resumed."""
    if not rundir.path.is_dir():
        return  # it was removed: do not create it again
    with contextlib.suppress(OSError):
        recovery.rebuild_state(rundir)  # somebody may have damaged it meanwhile
        rundir.write_state(status=status, reason=redact(reason), seconds=clock.seconds())


def explained(error: Exception) -> Exception:
    """Replace out-of-memory and disk-full errors by a TrainingError with a remedy; return other errors unchanged."""
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, RunnerError):
        return error
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return _training_error(f"out of memory: {error}".splitlines()[0], LESS_MEMORY, error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text:
        remedy = "free disk space, then repeat the command with this hydra.run.dir; or set outputs_dir to another disk"
        return _training_error(f"no space left on the device: {error}", remedy, error)
    return error


def _log_error(rundir: RunDir, error: Exception) -> None:
    """Print the error in one or two lines; the traceback goes into the log (RUNNER_TRACEBACK: to both)."""
    if isinstance(error, RunnerError):
        log.error(str(error), exc_info=error if shows_traceback() else None)
    else:
        log.error("".join(traceback.format_exception(error)), extra={} if shows_traceback() else {"quiet": True})
        log.error(f"{typed_line(error)}\n    → the traceback is in {rundir.log}")


def _saved(rundir: RunDir) -> str:
    step = rundir.saved_step()
    return f"the state is saved at step {step}" if step else "nothing was trained yet"


def _is_recorded(rundir: RunDir) -> bool:
    """Whether rank 0 records the end of the run within ``LAST_WORDS_S`` seconds."""
    until = time.monotonic() + LAST_WORDS_S
    while rundir.read_state().status in ("pending", "running"):
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
    return True


def _training_error(problem: str, remedy: str, error: Exception) -> TrainingError:
    explanation = TrainingError(Fault("", problem, remedy))
    explanation.__cause__ = error
    return explanation
