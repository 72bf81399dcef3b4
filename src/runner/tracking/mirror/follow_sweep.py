"""One process that mirrors all runs of a sweep into MLflow while queues on this machine work through them.

It makes the parent and its children first; a submitter waits for that. Then it follows what runs, tells each end and
the parent, and ends itself when no queue is left and all is told. A second one on the same sweep waits until the first
is done: should that be killed, it goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import RunnerError
from runner.files import locked, stamp, write_atomic
from runner.tracking.mirror.follow import (
    BATCH_S,
    GAVE_UP,
    GRACE_S,
    LONGEST_PAUSE_S,
    POLL_S,
    Follower,
    be_polite,
    only_one,
    say,
)
from runner.tracking.mirror.spawn import read_report
from runner.tracking.mlflow import parent_run, store
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.mlflow.run import ENDED, MlflowRun
from runner.tracking.rundir import RunDir, State
from runner.tracking.sweepdir import SweepDir

LOOK_S = 1.0
"""Between two looks at the runs that are not followed: their time stamps only, so that a thousand cost 5 ms."""


def open_only(sweep: SweepDir) -> int:
    """Make the parent and the children, and say so in mirror.json; returns 0, or 3 where the store does not answer."""
    return GAVE_UP if _opened(sweep) else 0


def follow_sweep(sweep: SweepDir, publish: Publish | None = None) -> int:
    """Make parent and children, then mirror all runs of the sweep until no queue is left and all is told.

    ``publish`` writes the results onto the parent at the end.

    Returns:
        the exit code: 0 all is told, 3 the store did not answer to the end.
    """
    problem = _opened(sweep)
    be_polite()
    with only_one(sweep.mirror_lock, wait=True) as mine:
        return _Mirror(sweep, problem, publish).until_told() if mine else 0


def _opened(sweep: SweepDir) -> str:
    """Returns the problem; empty where there is none. Whoever starts this starts the jobs next, so they are queued."""
    import mlflow  # noqa: F401 - seconds of import, which may pass while the submitter still prepares folders

    with locked(sweep.lock):
        pass
    problem = parent_run.try_open(sweep, queued=True)
    say(problem or "every run of the sweep has its id in MLflow")
    _report(sweep, opened=not problem, untold=0, problem=problem)
    return problem


def _report(sweep: SweepDir, **said: object) -> None:
    with contextlib.suppress(OSError):  # a full disk, or a folder that is gone
        write_atomic(sweep.mirror_report, json.dumps({"pid": os.getpid(), **said}))


@dataclass
class _Followed:
    follower: Follower
    lock: contextlib.ExitStack
    """Holds the run's mirror lock."""


@dataclass
class _Mirror:
    sweep: SweepDir
    problem: str
    """Why parent and children could not be made so far, or what the store last failed with."""
    publish: Publish | None = None
    opened: bool = False
    rundirs: list[RunDir] = field(default_factory=list)
    listed: tuple[int, ...] = ()
    """The stamp of the sweep.json that ``rundirs`` are from."""
    stamps: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    """Of the state.json of each run that needs nothing as long as it stays like that."""
    states: dict[Path, State] = field(default_factory=dict)
    active: dict[Path, _Followed] = field(default_factory=dict)
    others: set[Path] = field(default_factory=set)
    """Runs that another mirror is at work on."""
    silent_until: float = 0.0
    failures: int = 0
    parent_due: float = 0.0
    parent_knows: tuple[object, ...] = ()

    def until_told(self) -> int:
        self.opened = not self.problem
        look_due, last_told = 0.0, time.monotonic()
        while self.sweep.manifest.exists():
            has_queue = self.sweep.is_worked_on()  # before the look: a run that ended before its queue did is seen
            if time.monotonic() >= look_due:
                self._look()
                look_due = time.monotonic() + LOOK_S
                if not has_queue and not self.active and not self.others and self._tell_parent(False):
                    return self._end(0)
            is_at_work = has_queue or self.others or any(not each.follower.ended for each in self.active.values())
            if self._step() or is_at_work:
                last_told = time.monotonic()
            self._tell_parent(has_queue)
            if time.monotonic() - last_told > GRACE_S:
                return self._end(GAVE_UP)
            time.sleep(POLL_S)
        return 0

    def _look(self) -> None:
        """Take up what has begun or ended since the last look."""
        if (listed := stamp(self.sweep.manifest)) != self.listed:
            self.rundirs, self.listed = self.sweep.rundirs(), listed
        self.others.clear()
        for rundir in self.rundirs:
            path = rundir.path
            if path in self.active or (seen := stamp(rundir.state)) == self.stamps.get(path):
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged folder: sync says what is wrong
                state = self.states[path] = rundir.read_state()
                if not _has_to_be_told(rundir, state) or self._take_up(rundir):
                    self.stamps[path] = seen

    def _take_up(self, rundir: RunDir) -> bool:
        """Follow the run; False where another mirror does, which is looked at again."""
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
        if not parent_run.is_open(rundir, run.uri):  # a search has added it since
            self.opened = False
        follower = Follower(run, tells_parent=False, gpus=rundir.read_manifest().get("gpus"))
        self.active[rundir.path] = _Followed(follower, lock)
        return True

    def _step(self) -> bool:
        """Let each run that is followed do what is due; returns whether one was told to its end."""
        if not self.opened and time.monotonic() >= self.silent_until:
            self._answered(parent_run.try_open(self.sweep, queued=self.sweep.is_worked_on()))
            self.opened = not self.problem
        count = len(self.active)
        for path, each in list(self.active.items()):
            may_tell = self.opened and time.monotonic() >= self.silent_until
            if each.follower.ended and not may_tell:
                continue  # a thousand that ended while the store was away are not looked at five times a second
            failures = each.follower.failures
            is_done = each.follower.step(may_tell)
            self.states[path] = each.follower.state
            if each.follower.failures > failures and not store.answers(each.follower.run.uri):
                self._answered(each.follower.problem)
            elif is_done:
                self._answered("")
            if is_done:
                each.lock.close()
                del self.active[path]
                self.stamps.pop(path, None)  # it may have been taken up again meanwhile
        return len(self.active) < count

    def _answered(self, problem: str) -> None:
        """What the store said last; while it is silent nobody asks it."""
        self.failures = self.failures + 1 if problem else 0
        if problem:
            self.silent_until = time.monotonic() + min(2.0**self.failures, LONGEST_PAUSE_S)
        if problem != self.problem:
            self.problem = problem
            _report(self.sweep, opened=self.opened, untold=len(self.active), problem=problem)

    def _tell_parent(self, has_queue: bool) -> bool:
        """Bring the parent up to date if something changed; returns whether it is."""
        now, states = time.monotonic(), [self.states.get(rundir.path, State()) for rundir in self.rundirs]
        found = (has_queue, *sorted(Counter(state.status for state in states).items()))
        if not self.opened or found == self.parent_knows:
            return self.opened
        if now < max(self.silent_until, self.parent_due if has_queue else 0.0):
            return False
        self.parent_due = now + BATCH_S
        if problem := parent_run.update_parent(
            self.sweep, states=states, queued=has_queue or None, publish=self.publish
        ):
            say(problem)
            self._answered(problem)
            return False
        self.parent_knows = found
        return True

    def _end(self, code: int) -> int:
        untold = [each.follower.run.rundir for each in self.active.values()]
        for each in self.active.values():
            each.follower.run.report(each.follower.problem or self.problem)
        say(f"gave up: {len(untold)} runs are not in MLflow to their end" if code else "all runs are in MLflow")
        _report(self.sweep, opened=self.opened, untold=len(untold), problem=self.problem if code else "")
        return code


def _has_to_be_told(rundir: RunDir, state: State) -> bool:
    if state.status in ENDED:
        return read_report(rundir).get("told") != state.updated
    return state.status == "running"
