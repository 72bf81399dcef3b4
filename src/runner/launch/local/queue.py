"""Queue of runs on one machine: one process per run, forked after the imports; at most one run per slot.

A run is locked before its process is forked: if two queues contain the same run, one trains it and the other waits
without using a slot. Each process has its own session: Ctrl-C reaches only the queue, which forwards it once, and
closing the terminal kills no run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

from runner import streams
from runner.launch.launcher import Source
from runner.launch.local import child, exit_reason
from runner.launch.local.queued_run import QueuedRun
from runner.launch.local.slots import Slot
from runner.launch.progress_table import ProgressTable
from runner.signals import ONE_GESTURE_S, SIGNALS, signals_to
from runner.tracking.mirror.spawn import queueing
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DIED, DONE
from runner.tracking.sweepdir import SweepDir
from runner.train import outcome

Start = Callable[[RunDir], int]
"""Trains one run in the forked process; returns its exit code. It starts with stop signals blocked and unblocks them
when it can handle them."""

POLL_S, RETRY_LOCK_EVERY_S = 0.02, 0.5


@streams.unblocked()
def work_through(
    rundirs: list[RunDir],
    slots: list[Slot],
    start: Start,
    sweep: SweepDir | None = None,
    warm: Callable[[], None] = lambda: None,
    source: Source | None = None,
) -> list[int]:
    """Train all runs in this order, ``len(slots)`` at the same time.

    Args:
        warm: called once before the first fork, to import libraries for all processes. Must not leave threads running
            or initialize CUDA.
        source: proposes more runs whenever a slot is free.

    Returns:
        one exit code per run: 0, 1 or 2; after a stop 130 or 75 for every run that is not finished or not started.
    """
    with contextlib.ExitStack() as stack:
        if sweep:
            stack.enter_context(queueing(sweep))  # children inherit the lock and hold it if this process is killed
        table = stack.enter_context(ProgressTable(rundirs, len(slots), source.total if source else 0))
        queue = _Queue([QueuedRun(n, rundir) for n, rundir in enumerate(rundirs)], slots, start, table, warm, source)
        stack.enter_context(signals_to(queue.on_signal))
        return queue.run()


class _Stopped(BaseException):
    """Raised by the signal handler to interrupt the imports before the first fork."""


class _Queue:
    def __init__(
        self, jobs: list[QueuedRun], slots: list[Slot], start: Start, table: ProgressTable, warm: Callable[[], None],
        source: Source | None,
    ) -> None:  # fmt: skip
        self.jobs, self.start, self.table, self.warm, self.source = jobs, start, table, warm, source
        self.waiting, self.free = deque(jobs), deque(slots)
        self.running: dict[int, QueuedRun] = {}
        self.elsewhere: list[QueuedRun] = []
        self.stop_code: int | None = None
        self.is_warm = self.is_warming = self.is_killed = False
        self.oom_kills = exit_reason.oom_kills()
        self.retried_at = self.stopped_at = 0.0

    def run(self) -> list[int]:
        try:
            self.work()
        except BaseException:  # the source has failed: let the running processes save their state first
            self.source = None
            self.stop(signal.SIGTERM)
            self.work()
            raise
        unfinished = self.stop_code if self.stop_code is not None else 1  # 1: that run alone was stopped
        return [unfinished if job.code in (None, 75, 130) else job.code for job in self.jobs]

    def work(self) -> None:
        while self.running or (self.stop_code is None and (self.waiting or self.elsewhere or self.fetch())):
            self.reap()
            self.retry_locked()
            while self.free and self.stop_code is None and (self.waiting or self.fetch()):
                self.next()
            self.table.refresh()
            if self.source:
                self.source.poll()
            if self.running or self.elsewhere:
                time.sleep(POLL_S)

    def fetch(self) -> bool:
        """Add the next run of the source; False if there is none at the moment."""
        if not self.source or (rundir := self.source.next()) is None:
            return False
        job = QueuedRun(self.table.add(rundir), rundir)
        self.jobs.append(job)
        self.waiting.append(job)
        return True

    def next(self) -> None:
        """Start the next run, unless it needs no process or another process holds it."""
        job = self.waiting.popleft()
        if (status := job.rundir.read_state().status) in DONE:
            self.end(job, 0, status)
        elif not job.acquire():
            self.elsewhere.append(job)
            self.table.elsewhere(job.number)
        elif not self.is_settled(job):
            self.fork(job)

    def is_settled(self, job: QueuedRun) -> bool:
        """Whether a locked run needs no process: it was cancelled, or another process has finished it."""
        if job.is_cancelled():
            with contextlib.suppress(OSError):
                reason = job.rundir.cancel_request.read_text().strip() or "cancelled"
                job.rundir.write_state(status="killed", reason=reason)
            self.end(job, 130, "cancelled")
        elif state := job.outcome():
            if state.status == "running":  # but no process holds the lock
                state = replace(state, status="killed", reason=DIED)
                with contextlib.suppress(OSError):
                    job.rundir.write_state(status=state.status, reason=state.reason)
            self.end(job, outcome.exit_code(state), state.status, state.reason)
        return job.code is not None

    def retry_locked(self) -> None:
        """Lock the runs that other processes have released: record how each ended, or queue it again."""
        if time.monotonic() - self.retried_at < RETRY_LOCK_EVERY_S:
            return
        self.retried_at = time.monotonic()
        for job in [job for job in self.elsewhere if job.acquire()]:
            self.elsewhere.remove(job)
            if not self.is_settled(job):
                job.release()
                self.waiting.appendleft(job)

    def fork(self, job: QueuedRun) -> None:
        if not self.import_libraries():
            job.release()
            return
        job.slot, job.known = self.free.popleft(), job.rundir.read_state()
        job.forget_cancel()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # no handler may run before self.running has the pid
        pid = os.fork()
        if not pid:
            for other in self.running.values():
                other.release()  # closes this process's copy of the file only
            child.become(job.rundir, job.slot, self.start)  # does not return
        self.running[pid] = job
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.table.started(job.number)

    def import_libraries(self) -> bool:
        """Call ``warm`` before the first fork; False if the queue was stopped meanwhile."""
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
        """Collect the processes that have ended and free their slots."""
        for pid, job in list(self.running.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            if job.rundir.is_alive() and child.others_of(pid):
                continue  # ranks that outlive their parent: they still save
            child.kill_session(pid)  # its remaining children would keep the lock and the GPU
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            del self.running[pid]
            assert job.slot
            self.free.append(job.slot)
            self.close(job, code)

    def close(self, job: QueuedRun, code: int) -> None:
        """Record how a process has ended; writes state.json if the process could not."""
        state = job.rundir.read_state()
        if not job.rundir.manifest.exists():
            return self.end(job, 2, "refused", f"see {job.rundir.log}" if job.rundir.log.exists() else "")
        has_written = state.updated != job.known.updated and state.status not in ("pending", "running")
        has_written = has_written and state.reason != DIED  # written by another process, without the exit code
        if not has_written and code not in (0, 2):
            death = self.death(code)
            with contextlib.suppress(OSError), job.rundir.held() as is_held:  # a full disk: state.json stays as it is
                if is_held:
                    state = job.rundir.write_state(status=death.status, reason=death.reason)
            return self.end(job, death.code, death.status, death.reason)
        return self.end(job, code if code >= 0 else outcome.exit_code(state), state.status, state.reason)

    def death(self, code: int) -> exit_reason.Death:
        if code >= 0:
            return exit_reason.Death("failed", f"ended with exit code {code}, no reason recorded; see terminal.log", 1)
        if code == -signal.SIGKILL and self.is_killed:
            return exit_reason.Death("killed", "interrupted twice: killed immediately", 130)
        out_of_memory = code == -signal.SIGKILL and exit_reason.oom_kills() > self.oom_kills
        self.oom_kills += out_of_memory
        return exit_reason.by_signal(-code, out_of_memory=out_of_memory)

    def end(self, job: QueuedRun, code: int, status: str, reason: str = "") -> None:
        job.code = code
        job.release()
        self.table.ended(job.number, status, reason)
        if self.source:
            self.source.ended(job.rundir)

    def stop(self, number: int) -> None:
        """Let the running processes save their state and end; start no other run."""
        self.stop_code, self.stopped_at = (130 if number == signal.SIGINT else 75), time.monotonic()
        self.table.notice = f"stopping: {len(self.running)} runs save their state; press Ctrl-C again to kill them"
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """First signal: stop, the runs save their state. A second Ctrl-C kills them."""
        if self.stop_code is None:
            self.stop(number)
        elif number == signal.SIGINT and time.monotonic() - self.stopped_at > ONE_GESTURE_S:
            self.is_killed = True
            for pid in self.running:
                child.kill_session(pid)
        if self.is_warming:
            raise _Stopped
