"""How an attempt at a run ended, in words and in its state: stopped, refused, failed, or left by another rank."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import traceback

from runner.errors import LESS_MEMORY, Fault, Interrupted, Pruned, RunnerError, Stopped, TrainingError
from runner.secrets import redact
from runner.tracking import slurm_client
from runner.tracking.rundir import DIED, RunDir, State
from runner.tracking.sweepdir import sweep_of
from runner.train.distributed.ranks import Ranks, lost_peer

OUT_OF_MEMORY = ("outofmemory", "out of memory", "can't allocate memory", "not enough memory")
CODES = {"completed": 0, "pruned": 0, "preempted": 75, "killed": 130}
"""The exit code of a run by its status; 1 for every other."""
LAST_WORDS_S = 5.0
"""How long another rank's last words may take to be seen: its file travels through a shared file system."""
log = logging.getLogger("runner")


def exit_code(state: State) -> int:
    """The exit code that belongs to a state: of one killed by request 130, of one killed by anything else 1."""
    if state.status == "killed" and not state.reason.startswith(("interrupted", "cancelled")):
        return 1
    return CODES.get(state.status, 1)


class Clock:
    """Seconds of training, those of earlier attempts included; it stands until it is started."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.monotonic()

    @property
    def is_started(self) -> bool:
        return self._since is not None

    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)


def clear(rundir: RunDir) -> None:
    """Remove what an earlier attempt left to be said: its ranks' last words."""
    for path in rundir.path.glob(f"{rundir.rank_failure(0).name[:-1]}*"):
        path.unlink(missing_ok=True)


def refused(rundir: RunDir, clock: Clock, error: RunnerError) -> int:
    """Nothing was done. What the folder said before stays true, unless nobody is there to read this message."""
    log.error(str(error), exc_info=error if os.environ.get("RUNNER_TRACEBACK") else None)
    if is_unattended(rundir):
        note(rundir, clock, status="failed", reason=str(error))
        return 1
    if rundir.read_state().status == "running":  # a kill -9 that nobody has written down yet
        note(rundir, clock, status="killed", reason=DIED)
    return 2


def is_unattended(rundir: RunDir) -> bool:
    """Whether the run is one of a sweep or under a scheduler: what it says is read in its folder, later."""
    return "SLURM_JOB_ID" in os.environ or sweep_of(rundir) is not None


def stopped(rundir: RunDir, clock: Clock, error: BaseException) -> int:
    asked = error if isinstance(error, Stopped) else Interrupted("interrupted twice")
    reason = f"{asked}; {_saved(rundir)}"
    status, code = asked.status, asked.exit_code
    if rundir.cancel_request.exists():
        reason = f"{rundir.cancel_request.read_text().strip() or 'cancelled'}; {_saved(rundir)}"
        status, code = Interrupted.status, Interrupted.exit_code
    elif status == "preempted" and slurm_client.is_cancelled():
        reason = f"cancelled outside (scancel); {_saved(rundir)}"
        status, code = Interrupted.status, Interrupted.exit_code
    elif status == "preempted" and rundir.prune_request.exists():  # it would be taken up again only to be given up
        reason = f"{rundir.prune_request.read_text()}; {_saved(rundir)}"
        status, code = Pruned.status, Pruned.exit_code
    log.info(reason, extra={"quiet": True})
    note(rundir, clock, status=status, reason=reason)
    return code


def failed(rundir: RunDir, clock: Clock, error: Exception) -> int:
    error = explained(error)
    told(rundir, error)
    note(rundir, clock, status="failed", reason=first_line(error))
    return 1


def left_by_peer(rundir: RunDir, clock: Clock, ranks: Ranks, wait_s: float = LAST_WORDS_S) -> int:
    """Another rank is no more: its last words are the run's reason, and without any it was killed."""
    words = last_words(rundir, ranks, wait_s)
    if words:
        log.error(f"{words}\n    → the traceback is in {rundir.path}/train.rank-*.log")
        note(rundir, clock, status="failed", reason=words.splitlines()[0])
    else:
        reason = f"one of the {ranks.world} ranks died without saying so (killed, or out of memory); {_saved(rundir)}"
        log.error(reason)
        note(rundir, clock, status="killed", reason=reason)
    return 1


def last_words(rundir: RunDir, ranks: Ranks, wait_s: float) -> str:
    """Why another rank failed, ``rank 1: …``; empty where none says so within the time."""
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
    """The end of a rank beyond 0: it leaves its words to rank 0, or ends as rank 0 did if that left first."""
    if lost_peer(error):
        log.warning(f"lost another rank: {first_line(error)}")
        return 0 if _is_written_down(rundir) else 1
    error = explained(error)
    log.error("".join(traceback.format_exception(error)))
    with contextlib.suppress(OSError):
        rundir.rank_failure(ranks.rank).write_text(redact(first_line(error)))
    return 1


def note(rundir: RunDir, clock: Clock, *, status: str, reason: str) -> None:
    """Write down how it ended; on a full disk it stays unwritten, and the run counts as killed: it can be continued."""
    with contextlib.suppress(OSError):
        rundir.write_state(status=status, reason=redact(reason), seconds=clock.seconds())


def explained(error: Exception) -> Exception:
    """Failures of the machine in words that help; everything else as it is."""
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, RunnerError):
        return error
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return _told_as(f"out of memory: {error}".splitlines()[0], LESS_MEMORY, error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text:
        remedy = "make room, then give the same command with this hydra.run.dir; or set outputs_dir elsewhere"
        return _told_as(f"no space left on the device: {error}", remedy, error)
    return error


def told(rundir: RunDir, error: Exception) -> None:
    """Say it on the terminal in a line or two; the traceback goes into the log."""
    wanted = bool(os.environ.get("RUNNER_TRACEBACK"))
    if isinstance(error, RunnerError):
        log.error(str(error), exc_info=error if wanted else None)
    else:
        log.error("".join(traceback.format_exception(error)), extra={} if wanted else {"quiet": True})
        log.error(f"{first_line(error)}\n    → the traceback is in {rundir.log}")


def first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    first = text.splitlines()[0]
    return first if isinstance(error, RunnerError) else f"{type(error).__name__}: {first}"


def _saved(rundir: RunDir) -> str:
    step = rundir.saved_step()
    return f"the state is saved at step {step}" if step else "nothing was trained yet"


def _is_written_down(rundir: RunDir) -> bool:
    """Whether rank 0 says within a moment how the run ended."""
    until = time.monotonic() + LAST_WORDS_S
    while rundir.read_state().status in ("pending", "running"):
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
    return True


def _told_as(problem: str, remedy: str, error: Exception) -> TrainingError:
    told = TrainingError(Fault("", problem, remedy))
    told.__cause__ = error
    return told
