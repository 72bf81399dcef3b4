"""Upload all runs of a sweep to MLflow from one process, while local queues run the sweep.

First creates the parent run (the submitter waits for this). Then uploads the active runs, updates
the parent run, and ends when no queue is left and everything is uploaded. A second process for the same sweep waits for
the first to end, and continues if the first was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runner import imports
from runner.errors import RunnerError
from runner.files import locked, stamp, write_atomic
from runner.tracking import webhook
from runner.tracking.mirror.follow import (
    BATCH_S,
    GAVE_UP,
    GRACE_S,
    LONGEST_PAUSE_S,
    POLL_S,
    Follower,
    lower_priority,
    only_one,
    say,
)
from runner.tracking.mirror.spawn import read_report
from runner.tracking.mlflow import batch, parent_run, store
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.mlflow.run import ENDED, MlflowRun
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir

MOST_ACTIVE = 200
"""Ended runs that are uploaded at the same time: each holds a file open."""
SCAN_S = 1.0
"""Between two scans for started or ended runs; a scan compares time stamps only: 5 ms for a thousand runs."""


def open_only(sweep: SweepDir) -> int:
    """Create the parent run, and report it in mirror.json; returns 0, or 3 if the store fails."""
    return GAVE_UP if _open(sweep) else 0


def follow_sweep(sweep: SweepDir, publish: Publish | None = None) -> int:
    """Create the parent run, then upload all runs until no queue is left and all are uploaded.

    ``publish`` writes the results to the parent run at the end.

    Returns:
        exit code: 0 everything is uploaded, 3 the store did not answer.
    """
    problem = _open(sweep)
    lower_priority()
    with only_one(sweep.mirror_lock, wait=True) as is_locked:
        return _Mirror(sweep, problem, publish).run() if is_locked else 0


def _open(sweep: SweepDir) -> str:
    """Create the parent run; returns the error message, empty on success. The submitter starts the jobs next."""
    with imports.uncollected():
        import mlflow  # noqa: F401 - takes seconds: import it while the submitter prepares the run folders

    with locked(sweep.lock):  # the submitter holds this lock while it prepares the run folders
        pass
    problem = parent_run.try_open(sweep, queued=True)
    say(problem or "created the parent run of the sweep in MLflow")
    _report(sweep, opened=not problem, incomplete=0, problem=problem)
    return problem


def _report(sweep: SweepDir, **progress: object) -> None:
    with contextlib.suppress(OSError):  # a full disk, or a folder that is gone
        write_atomic(sweep.mirror_report, json.dumps({"pid": os.getpid(), **progress}))


@dataclass
class _Followed:
    follower: Follower
    lock: contextlib.ExitStack
    """Holds the mirror lock of the run."""


@dataclass
class _Mirror:
    sweep: SweepDir
    problem: str
    """The last error of the store; empty if the last call succeeded."""
    publish: Publish | None = None
    opened: bool = False
    """Whether the parent run exists."""
    rundirs: list[RunDir] = field(default_factory=list)
    listed: tuple[int, ...] = ()
    """Stamp of sweep.json when ``rundirs`` was read."""
    stamps: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    """Run folder → stamp of its state.json; the run needs no upload until this stamp changes."""
    states: dict[Path, State] = field(default_factory=dict)
    active: dict[Path, _Followed] = field(default_factory=dict)
    others: set[Path] = field(default_factory=set)
    """Runs that another process uploads."""
    silent_until: float = 0.0
    """Do not call the store before this time, as it did not answer."""
    failures: int = 0
    parent_due: float = 0.0
    also: dict[str, str] = field(default_factory=dict)
    """Each tracker of ``tracking.also`` that lacks something of an ended run → the first reason."""
    webhook: str | None = None
    """The webhook of the runs that this process has uploaded."""
    parent_counts: tuple[object, ...] = ()
    """The counts that the parent run has."""

    def run(self) -> int:
        self.opened = not self.problem
        scan_due, last_progress = 0.0, time.monotonic()
        while self.sweep.manifest.exists():
            has_queue = self.sweep.is_worked_on()  # before the scan, which then finds all runs of an ended queue
            if time.monotonic() >= scan_due:
                self._scan()
                scan_due = time.monotonic() + SCAN_S
                if not has_queue and not self.active and not self.others and self._update_parent(False):
                    return self._end(0)
            is_training = has_queue or self.others or any(not each.follower.ended for each in self.active.values())
            if self._step() or is_training:
                last_progress = time.monotonic()
            self._update_parent(has_queue)
            if time.monotonic() - last_progress > GRACE_S:
                return self._end(GAVE_UP)
            time.sleep(POLL_S)
        return 0

    def _scan(self) -> None:
        """Find runs that started or ended since the last scan, and follow them."""
        if (listed := stamp(self.sweep.manifest)) != self.listed:
            self.rundirs, self.listed = self.sweep.rundirs(), listed
        self.others.clear()
        for rundir in self.rundirs:
            path = rundir.path
            if path in self.active or (current := stamp(rundir.state)) == self.stamps.get(path):
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged folder: sync reports the error
                state = self.states[path] = rundir.read_state()
                if state.status in ENDED and len(self.active) >= MOST_ACTIVE:
                    continue
                if not _needs_upload(rundir, state) or self._follow(rundir):
                    self.stamps[path] = current

    def _follow(self, rundir: RunDir) -> bool:
        """Start to upload the run; False if another process does: the next scan tries again."""
        lock = contextlib.ExitStack()
        if not lock.enter_context(only_one(rundir.mirror_lock, wait=False)):
            self.others.add(rundir.path)
            return False
        try:
            run = MlflowRun.of(rundir)
        except RunnerError as error:
            say(str(error), rundir)
            lock.close()
            return True
        if run.tracking.kind == "offline":
            lock.close()
            return True
        self.webhook = run.tracking.webhook
        follower = Follower(run, updates_parent=False, gpus=rundir.read_manifest().get("gpus"))
        self.active[rundir.path] = _Followed(follower, lock)
        return True

    def _step(self) -> bool:
        """Upload what is new of each active run; returns whether a run was completed."""
        if not self.opened and time.monotonic() >= self.silent_until:
            self._record_answer(parent_run.try_open(self.sweep, queued=self.sweep.is_worked_on()))
            self.opened = not self.problem
        count = len(self.active)
        self._upload_ended()
        for path, each in list(self.active.items()):
            may_upload = self.opened and time.monotonic() >= self.silent_until
            if each.follower.ended and not may_upload:
                continue  # a thousand runs may have ended while the store did not answer: do not poll them
            failures = each.follower.failures
            is_done = each.follower.step(may_upload)
            self.states[path] = each.follower.state
            if each.follower.failures > failures and not store.answers(each.follower.run.uri):
                self._record_answer(each.follower.problem)
            elif is_done:
                self._record_answer("")
            if is_done:
                self.also = {name: text for name, text in each.follower.run.also.items() if text} | self.also
                each.lock.close()
                del self.active[path]
                self.stamps.pop(path, None)  # the run may have been started again meanwhile
        return len(self.active) < count

    def _upload_ended(self) -> None:
        """Upload runs that had ended when they were found, such as those of a cancelled sweep, with few commits."""
        runs = [
            each.follower.run
            for each in self.active.values()
            if each.follower.state.status in ENDED and each.follower.run.run is None and not each.follower.failures
        ]
        if len(runs) > 1 and self.opened and time.monotonic() >= self.silent_until:
            batch.update(runs)

    def _record_answer(self, problem: str) -> None:
        """Record the result of the last call of the store; pause further calls after an error."""
        self.failures = self.failures + 1 if problem else 0
        if problem:
            self.silent_until = time.monotonic() + min(2.0**self.failures, LONGEST_PAUSE_S)
        if problem != self.problem:
            self.problem = problem
            _report(self.sweep, opened=self.opened, incomplete=len(self.active), problem=problem)

    def _update_parent(self, has_queue: bool) -> bool:
        """Update the parent run if counts changed; returns whether it is up to date."""
        now, states = time.monotonic(), [self.states.get(rundir.path, State()) for rundir in self.rundirs]
        counts = (has_queue, *sorted(Counter(state.status for state in states).items()))
        if not self.opened or counts == self.parent_counts:
            return self.opened
        if now < max(self.silent_until, self.parent_due if has_queue else 0.0):
            return False
        self.parent_due = now + BATCH_S
        queued = has_queue or None
        if problem := parent_run.update_parent(self.sweep, states=states, queued=queued, publish=self.publish):
            say(problem)
            self._record_answer(problem)
            return False
        self.parent_counts = counts
        return True

    def _end(self, code: int) -> int:
        for each in self.active.values():
            each.follower.run.report(each.follower.problem or self.problem)
        say(f"gave up: {len(self.active)} runs not fully uploaded" if code else "uploaded all runs")
        progress = {"problem": self.problem if code else "", "also": self.also, "webhook": self._notify()}
        _report(self.sweep, opened=self.opened, incomplete=len(self.active), **progress)
        return code

    def _notify(self) -> str:
        """Send the message about the end of the sweep; returns the error message, empty on success."""
        if self.webhook is None:
            return ""
        states = [self.states.get(rundir.path, State()) for rundir in self.rundirs]
        status = parent_run.parent_status(states, False)
        if problem := webhook.notify(self.webhook, webhook.of_sweep(self.sweep, status, states)):
            say(f"webhook {problem}")
        return problem


def _needs_upload(rundir: RunDir, state: State) -> bool:
    if state.status in ENDED:
        return read_report(rundir).get("uploaded") != state.updated
    return state.status == "running"
