"""One run folder followed into MLflow, step by step: the work of the process beside a worker, or of a sweep's mirror.

The folder is the truth. Whatever stops this process, the next one looks at what MLflow has and sends the rest. It
outlives its worker, so that a run which was killed is said to be killed, in the folder and in MLflow.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import time
from collections.abc import Iterator
from pathlib import Path

from runner.secrets import redact
from runner.tracking.metrics_log import append_to, tail
from runner.tracking.mirror.sampler import Sampler
from runner.tracking.mlflow import parent_run
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.mlflow.run import ENDED, MlflowRun
from runner.tracking.rundir import DIED, RunDir, State
from runner.tracking.sweepdir import sweep_of

POLL_S = 0.2
BATCH_S = 2.0
"""Between two batches while the run goes on: MLflow's pages are two seconds behind, at 1 % of a core."""
GRACE_S = 15.0
"""How long after the end of the run a store that does not answer is asked again."""
LONGEST_PAUSE_S = 10.0
GAVE_UP = 3


def follow(rundir: RunDir, since: float = 0.0, publish: Publish | None = None) -> int:
    """Mirror the folder until MLflow knows how the run ended; its sweep's parent, if it has one, is kept up to date.

    ``since`` is the time stamp of the state that the folder had before this attempt of the run; ``publish`` writes the
    results of a sweep onto its parent.

    Returns:
        the exit code: 0 all is told or there is nothing to tell, 3 the store did not answer to the end.
    """
    with only_one(rundir.mirror_lock, wait=True) as mine:
        if not mine or not _has_begun(rundir, since):
            return 0
        follower, give_up_at = Follower(MlflowRun.of(rundir), tells_parent=True, publish=publish), float("inf")
        while not follower.step():
            if not follower.ended:
                give_up_at = float("inf")
            elif give_up_at == float("inf"):
                give_up_at = time.monotonic() + GRACE_S
            if time.monotonic() > give_up_at:
                say(f"gave up: {follower.run.report(follower.problem)} records are not in MLflow")
                return GAVE_UP
            time.sleep(POLL_S)
        return 0


class Follower:
    """Brings one run into MLflow while it goes on, and tells how it ended."""

    def __init__(
        self, run: MlflowRun, *, tells_parent: bool, gpus: str | None = None, publish: Publish | None = None
    ) -> None:
        """``tells_parent``: nobody else keeps the parent of its sweep; ``gpus``: as in CUDA_VISIBLE_DEVICES."""
        self.run, self.problem, self.failures, self.ended = run, "", 0, False
        self.state = run.rundir.read_state()
        self._publish = publish
        self._parent = sweep_of(run.rundir) if tells_parent else None
        self._parent_is_made, self._parent_knows, self._due = False, "", 0.0
        self._samples = _samples(run, gpus)
        run.packages = _installed()

    def step(self, may_tell: bool = True) -> bool:
        """Do what is due; True once all is told of a run that ended, or where its folder is gone."""
        if not self.run.rundir.state.exists():
            return True
        self.state = close_if_dead(self.run.rundir)
        before, self.ended = self.ended, self.state.status in ENDED
        if not self.ended:
            next(self._samples)
        elif not before:
            self._due = 0.0
        if not may_tell or time.monotonic() < self._due:
            return False
        before_problem, self.problem = self.problem, self._tell()
        self.failures = self.failures + 1 if self.problem else 0
        if self.problem != before_problem:
            say(self.problem or "the store answers again", self.run.rundir)
            self.run.report(self.problem)
        if self.ended and not self.problem:
            say(f"all {self.run.sent} records are in MLflow", self.run.rundir)
            self.run.report("")
            return True
        pause = min(2.0**self.failures, LONGEST_PAUSE_S) if self.problem else BATCH_S
        self._due = time.monotonic() + (min(pause, 1.0) if self.ended else pause)
        return False

    def _tell(self) -> str:
        run = self.run
        if self._parent and not self._parent_is_made:
            # The store may not have answered when the sweep was submitted: whoever comes first makes the parent.
            if not parent_run.is_open(run.rundir, run.uri) and (problem := parent_run.try_open(self._parent)):
                return problem
            self._parent_is_made = True
        if problem := run.try_update():
            return problem
        if self._parent and self._parent_knows != run.status:
            if problem := parent_run.update_parent(self._parent, publish=self._publish):
                return problem
            self._parent_knows = run.status
        return ""


def close_if_dead(rundir: RunDir) -> State:
    """Say ``killed`` of a run whose process here is gone while its state says ``running``; returns the state."""
    state = rundir.read_state()
    if state.status == "running" and _is_here(state) and not rundir.is_alive():
        with rundir.held() as mine:
            if mine and rundir.read_state().status == "running":
                state = rundir.write_state(status="killed", reason=DIED)
    return state


def _is_here(state: State) -> bool:
    """Whether the run is on this machine: of another one nothing can be seen from here."""
    return state.host in ("", os.uname().nodename)


@contextlib.contextmanager
def only_one(lock: Path, wait: bool) -> Iterator[bool]:
    """Be the only one behind this lock; yields False where another is, or where the folder is gone."""
    try:
        handle = lock.open("a")
    except FileNotFoundError:
        yield False
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def be_polite() -> None:
    """Leave the processor to workers from here on; not before, while a submitter waits for this process."""
    with contextlib.suppress(OSError):
        os.nice(5)  # at 10 it got nothing for minutes where every core was taken


def say(text: str, rundir: RunDir | None = None) -> None:
    """One line with the time, for mirror.log."""
    where = f"{rundir.path.name}: " if rundir else ""
    print(time.strftime("%F %T"), where + redact(text), flush=True)


def _has_begun(rundir: RunDir, since: float) -> bool:
    """Wait until the worker has begun to train; False if it never does: it was refused, there is nothing to tell."""
    import mlflow  # noqa: F401 - seconds of import, spent while the worker imports its own

    while rundir.path.exists():
        state = rundir.read_state()
        if state.status == "running" or (state.status in ENDED and state.updated != since):
            return True
        if not rundir.is_alive():
            return state.status in ENDED
        time.sleep(POLL_S)
    return False


def _samples(run: MlflowRun, gpus: str | None) -> Iterator[None]:
    """Each ``next`` appends a sample of the machine to system.jsonl if one is due."""
    if not run.tracking.system_metrics:
        while True:
            yield
    rundir, sampler = run.rundir, Sampler(run.rundir.path, gpus)
    step = max((record["step"] for record in tail(rundir.system, 0)[0]), default=-1) + 1
    due = time.monotonic()
    while True:
        if time.monotonic() >= due:
            due = time.monotonic() + run.tracking.system_interval_s
            with contextlib.suppress(OSError):  # a full disk: the samples are the least of it
                append_to(rundir.system, {"step": step, "time": time.time(), **sampler.sample(rundir.read_state().pid)})
                step += 1
        yield


@functools.cache
def _installed() -> dict[str, str]:
    found = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return dict(sorted(found.items(), key=lambda item: str(item[0]).lower()))
