"""Many runs on one machine: a process each, forked warm from this one, as many at once as there are slots.

Each run is claimed before its process comes to life, so that of two queues over the same runs one works and the other
waits, without a slot. Each process has a session of its own: the terminal's Ctrl-C reaches this one alone, which
passes it on once, and a terminal that is closed takes no run along.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import IO

from runner.files import stamp
from runner.launch.launcher import Source
from runner.launch.local import child, exit_reason
from runner.launch.local.slots import Slot
from runner.launch.progress_table import ProgressTable
from runner.signals import ONE_GESTURE_S, SIGNALS
from runner.tracking.mirror.spawn import queueing
from runner.tracking.rundir import DIED, DONE, RunDir, State
from runner.tracking.sweepdir import SweepDir
from runner.train import outcome

Start = Callable[[RunDir], int]
"""Works on one run in the forked process; returns its exit code. It begins with the signals that stop it blocked, and
lets them through once it can honour them."""

STOPPING = (*SIGNALS, signal.SIGHUP)
POLL_S, LOOK_EVERY_S = 0.02, 0.5


def work_through(
    rundirs: list[RunDir],
    slots: list[Slot],
    start: Start,
    sweep: SweepDir | None = None,
    warm: Callable[[], None] = lambda: None,
    source: Source | None = None,
) -> list[int]:
    """Bring all runs to their ends, in this order, ``len(slots)`` at once.

    Args:
        source: proposes further runs, each when there is a free slot for it.
        warm: called before the first process is forked; what it imports all of them have. No thread may be left by it
            and CUDA not be touched.

    Returns:
        an exit code for each: 0, 1 or 2; after a stop 130 or 75 for all that it left undone, those not started too.
    """
    with contextlib.ExitStack() as held:
        if sweep:
            held.enter_context(queueing(sweep))  # the forked processes inherit it, and hold it if this one is killed
        table = held.enter_context(ProgressTable(rundirs, len(slots), source.total if source else 0))
        queue = _Queue([Job(n, rundir) for n, rundir in enumerate(rundirs)], slots, start, table, warm, source)
        held.enter_context(queue.listening())
        return queue.run()


@dataclass
class Job:
    """One run on its way through the queue."""

    number: int
    rundir: RunDir
    known: State = field(default_factory=State)
    """What its state was when it was handed over; then, when its process was forked."""
    asked: tuple[int, ...] = ()
    """The stamp of the cancel request that lay there already: whoever hands the run over wants it all the same."""
    claim: IO[str] | None = None
    slot: Slot | None = None
    code: int | None = None

    def __post_init__(self) -> None:
        self.known, self.asked = self.rundir.read_state(), stamp(self.rundir.cancel_request)

    def take(self) -> bool:
        """Claim the run for this queue; False where another queue or worker has it."""
        try:
            self.claim = self.rundir.queue_lock.open("a")
            fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError:  # a full disk, a folder that is gone: the worker has the words for that
            self.release()
        if self.rundir.is_alive():
            self.release()
            return False
        return True

    def release(self) -> None:
        if self.claim:
            self.claim.close()
        self.claim = None

    def is_cancelled(self) -> bool:
        return stamp(self.rundir.cancel_request) not in ((), self.asked)

    def forget_cancel(self) -> None:
        """Drop the request that lay there when the run was handed over: its worker honours what it finds."""
        if not self.is_cancelled():
            with contextlib.suppress(OSError):
                self.rundir.cancel_request.unlink(missing_ok=True)

    def outcome(self) -> State | None:
        """The state in which others left this run since it was handed over; None where it is still to be worked on."""
        state, known = self.rundir.read_state(), self.known
        another_attempt = state.attempt != known.attempt
        if another_attempt and not state.reason.startswith("cancelled") and outcome.exit_code(state) in (75, 130):
            return None  # another queue was told to stop, and this one was not
        if state.status == "completed" or (state.status != "pending" and another_attempt):
            return state
        return state if state.status in ("failed", "preempted", "pruned") and state.updated != known.updated else None


class _Stopped(BaseException):
    """Raised out of what may be left half done: the imports before the first process."""


class _Queue:
    def __init__(
        self, jobs: list[Job], slots: list[Slot], start: Start, table: ProgressTable, warm: Callable[[], None],
        source: Source | None,
    ) -> None:  # fmt: skip
        self.jobs, self.start, self.table, self.warm, self.source = jobs, start, table, warm, source
        self.waiting, self.free = deque(jobs), deque(slots)
        self.running: dict[int, Job] = {}
        self.elsewhere: list[Job] = []
        self.stop_code: int | None = None
        self.is_warm = self.is_warming = self.is_killed = False
        self.oom_kills = exit_reason.oom_kills()
        self.looked = self.stopped_at = 0.0

    def run(self) -> list[int]:
        try:
            self.work()
        except BaseException:  # what proposes runs has failed: those that are at work save their state first
            self.source = None
            self.ask_to_stop(signal.SIGTERM)
            self.work()
            raise
        undone = self.stop_code if self.stop_code is not None else 1  # a run that was ended alone has stopped no other
        return [undone if job.code in (None, 75, 130) else job.code for job in self.jobs]

    def work(self) -> None:
        while self.running or (self.stop_code is None and (self.waiting or self.elsewhere or self.supplied())):
            self.reap()
            self.look_elsewhere()
            while self.free and self.stop_code is None and (self.waiting or self.supplied()):
                self.next()
            self.table.look()
            if self.source:
                self.source.look()
            if self.running or self.elsewhere:
                time.sleep(POLL_S)

    def supplied(self) -> bool:
        """Ask for a further run; False where there is none, or none yet."""
        if not self.source or (rundir := self.source.next()) is None:
            return False
        job = Job(self.table.add(rundir), rundir)
        self.jobs.append(job)
        self.waiting.append(job)
        return True

    def next(self) -> None:
        """Start the next run; or see that it needs no process, or is somebody else's for now."""
        job = self.waiting.popleft()
        if (status := job.rundir.read_state().status) in DONE:
            self.end(job, 0, status)
        elif not job.take():
            self.elsewhere.append(job)
            self.table.elsewhere(job.number)
        elif not self.is_settled(job):
            self.fork(job)

    def is_settled(self, job: Job) -> bool:
        """Whether the run, now ours, needs no process: it was cancelled, or others brought it to an end."""
        if job.is_cancelled():
            with contextlib.suppress(OSError):
                reason = job.rundir.cancel_request.read_text().strip() or "cancelled"
                job.rundir.write_state(status="killed", reason=reason)
            self.end(job, 130, "cancelled")
        elif state := job.outcome():
            if state.status == "running":  # and nobody holds it
                state = replace(state, status="killed", reason=DIED)
                with contextlib.suppress(OSError):
                    job.rundir.write_state(status=state.status, reason=state.reason)
            self.end(job, outcome.exit_code(state), state.status, state.reason)
        return job.code is not None

    def look_elsewhere(self) -> None:
        """Take back what others have let go of: to count how it ended, or to start it after all."""
        if time.monotonic() - self.looked < LOOK_EVERY_S:
            return
        self.looked = time.monotonic()
        for job in [job for job in self.elsewhere if job.take()]:
            self.elsewhere.remove(job)
            if not self.is_settled(job):
                job.release()
                self.waiting.appendleft(job)

    def fork(self, job: Job) -> None:
        if not self.warmed():
            job.release()
            return
        job.slot, job.known = self.free.popleft(), job.rundir.read_state()
        job.forget_cancel()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # nothing comes between the fork and knowing of it
        pid = os.fork()
        if not pid:
            for other in self.running.values():
                other.release()  # of this process alone: the claims are their owners'
            child.become(job.rundir, job.slot, self.start, STOPPING)  # and never comes back
        self.running[pid] = job
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        self.table.started(job.number)

    def warmed(self) -> bool:
        """Import before the first fork; False where a stop came in between."""
        try:
            self.is_warming = not self.is_warm
            if self.is_warming and self.stop_code is None:
                self.warm()
        except _Stopped:
            return False
        finally:
            self.is_warming = False
        self.is_warm = True
        return self.stop_code is None

    def reap(self) -> None:
        """See which processes have ended, and how; their slots are free again."""
        for pid, job in list(self.running.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            if job.rundir.is_alive() and child.others_of(pid):
                continue  # ranks that outlive the process which started them: they save
            child.kill_session(pid)  # what it leaves behind would keep its claim and its GPU
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            del self.running[pid]
            assert job.slot
            self.free.append(job.slot)
            self.close(job, code)

    def close(self, job: Job, code: int) -> None:
        """Write down the end of a process that could not do so itself, and count it."""
        state = job.rundir.read_state()
        if not job.rundir.manifest.exists():
            return self.end(job, 2, "refused", f"see {job.rundir.log}" if job.rundir.log.exists() else "")
        spoken = state.updated != job.known.updated and state.status not in ("pending", "running")
        spoken = spoken and state.reason != DIED  # whoever looked in between cannot know more
        if not spoken and code not in (0, 2):
            death = self.death(code)
            with contextlib.suppress(OSError), job.rundir.held() as mine:  # a full disk: it stays unwritten
                if mine:
                    state = job.rundir.write_state(status=death.status, reason=death.reason)
            return self.end(job, death.code, death.status, death.reason)
        return self.end(job, code if code >= 0 else outcome.exit_code(state), state.status, state.reason)

    def death(self, code: int) -> exit_reason.Death:
        if code >= 0:
            return exit_reason.Death("failed", f"ended with exit code {code} and without a word; see terminal.log", 1)
        if code == -signal.SIGKILL and self.is_killed:
            return exit_reason.Death("killed", "interrupted twice: killed at once", 130)
        rose = code == -signal.SIGKILL and exit_reason.oom_kills() > self.oom_kills
        self.oom_kills += rose
        return exit_reason.by_signal(-code, out_of_memory=rose)

    def end(self, job: Job, code: int, status: str, reason: str = "") -> None:
        job.code = code
        job.release()
        self.table.ended(job.number, status, reason)
        if self.source:
            self.source.ended(job.rundir)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, what would end this process stops the queue; a SIGHUP that is ignored stays so."""
        before = {number: signal.getsignal(number) for number in STOPPING}
        mine = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in mine:
            signal.signal(number, self.on_signal)
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, before[number])

    def ask_to_stop(self, number: int) -> None:
        self.stop_code, self.stopped_at = (130 if number == signal.SIGINT else 75), time.monotonic()
        self.table.notice = f"stopping: {len(self.running)} save their state; Ctrl-C again kills them at once"
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """The first stops: the runs save their state. A further Ctrl-C kills them."""
        if self.stop_code is None:
            self.ask_to_stop(number)
        elif number == signal.SIGINT and time.monotonic() - self.stopped_at > ONE_GESTURE_S:
            self.is_killed = True
            for pid in self.running:
                child.kill_session(pid)
        if self.is_warming:
            raise _Stopped
