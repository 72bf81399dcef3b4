"""Upload one run folder to MLflow while the run trains, in the upload process of the run or of its sweep.

The run folder is the source of truth: if this process is killed, the next one compares MLflow with the folder and sends
what is missing. It outlives the worker, so that a killed run gets the status killed in state.json and in MLflow.
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

from runner import imports
from runner.errors import DamagedError
from runner.secrets import redact
from runner.tracking import webhook
from runner.tracking.also.sending import Sending
from runner.tracking.metrics_log import append_to, tail
from runner.tracking.mirror.system_metrics import Sampler
from runner.tracking.mlflow import parent_run
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.mlflow.run import ENDED, MlflowRun
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DIED, State
from runner.tracking.sweepdir import sweep_of

POLL_S = 0.2
BATCH_S = 2.0
"""Between two uploads while the run trains: MLflow lags two seconds behind, at a cost of 1 % of a core."""
GRACE_S = 15.0
"""After the end of the run: how long to retry if the store does not answer."""
LONGEST_PAUSE_S = 10.0
GAVE_UP = 3


def follow(rundir: RunDir, since: float = 0.0, publish: Publish | None = None) -> int:
    """Upload the folder until the end of the run is uploaded; also update the parent run of its sweep, if any.

    Args:
        since: ``updated`` of state.json before this attempt of the run.
        publish: writes the results of a sweep to its parent run.

    Returns:
        exit code: 0 everything is uploaded, or there is nothing to upload; 3 the store did not answer.
    """
    with only_one(rundir.mirror_lock, wait=True) as is_locked:
        if not is_locked or not _has_started(rundir, since):
            return 0
        follower = Follower(MlflowRun.of(rundir), updates_parent=True, publish=publish)
        code = _to_the_end(follower)
        follower.notify()
        return code


def _to_the_end(follower: Follower) -> int:
    """Upload until the end of the run is uploaded, or the store does not answer after it; returns the exit code."""
    give_up_at = float("inf")
    while not follower.step():
        if not follower.ended:
            give_up_at = float("inf")
        elif give_up_at == float("inf"):
            give_up_at = time.monotonic() + GRACE_S
        if time.monotonic() > give_up_at:
            say(f"gave up: {follower.run.report(follower.problem)} records not uploaded")
            return GAVE_UP
        time.sleep(POLL_S)
    return 0


class Follower:
    """Uploads one run to MLflow, and sends it to its other trackers, while it trains, until its end is uploaded."""

    def __init__(
        self, run: MlflowRun, *, updates_parent: bool, gpus: str | None = None, publish: Publish | None = None
    ) -> None:
        """``updates_parent``: also update the parent run of the sweep; ``gpus``: as in CUDA_VISIBLE_DEVICES."""
        self.run, self.problem, self.failures, self.ended = run, "", 0, False
        self.state = run.rundir.read_state()
        self._publish = publish
        self._parent = sweep_of(run.rundir) if updates_parent else None
        self._parent_exists, self._parent_status, self._due = False, "", 0.0
        self._samples = _samples(run, gpus)
        self._also = Sending(run.rundir, run.tracking, run.config, run.also)
        run.packages = _installed()

    def step(self, may_upload: bool = True) -> bool:
        """Sample and upload if due; True once the run has ended and is uploaded, or its folder is gone."""
        if not (self.run.rundir.state.exists() and self.run.rundir.manifest.exists()):
            self._close_removed()
            return True
        try:
            self.state = close_if_dead(self.run.rundir)
        except DamagedError as error:
            say(str(error), self.run.rundir)
            return True
        before, self.ended = self.ended, self.state.status in ENDED
        if not self.ended:
            next(self._samples)
        elif not before:
            self._due = 0.0
        if lines := self._also.send(self.state):
            self.run.report(self.problem)
            for line in lines:
                say(line, self.run.rundir)
        if not may_upload or time.monotonic() < self._due:
            return False
        before_problem, self.problem = self.problem, self._upload()
        self.failures = self.failures + 1 if self.problem else 0
        if self.problem != before_problem:
            say(self.problem or "the MLflow store answers again", self.run.rundir)
            self.run.report(self.problem)
        if self.ended and not self.problem:
            if self.run.uploaded != self.run.rundir.read_state().updated:
                return False  # the launcher has added its reason meanwhile
            say(f"uploaded all {self.run.sent} records", self.run.rundir)
            self.run.report("")
            return True
        pause = min(2.0**self.failures, LONGEST_PAUSE_S) if self.problem else BATCH_S
        self._due = time.monotonic() + (min(pause, 1.0) if self.ended else pause)
        return False

    def notify(self) -> None:
        """Send the message about the end of a run to its webhook; of a sweep, the end of all of it is reported."""
        run = self.run
        if self.state.status not in ENDED or self._parent or not run.rundir.state.exists():
            return
        run.webhook = webhook.notify(run.tracking.webhook, webhook.of_run(run.rundir, run.rundir.read_state()))
        if run.webhook:
            say(f"webhook {run.webhook}", run.rundir)
            run.report(self.problem)

    def _close_removed(self) -> None:
        """The folder of the run was removed while it trained: do not leave its MLflow run running."""
        self._also.close()
        reason = f"its folder was removed: {self.run.rundir.path}"
        say(self.run.try_close(reason) or reason)

    def _upload(self) -> str:
        """Upload what is new; returns the error message, empty on success."""
        run = self.run
        if self._parent and not self._parent_exists:
            # The store may not have answered when the sweep was submitted: then the first run creates the parent run.
            if not parent_run.is_open(self._parent, run.uri) and (problem := parent_run.try_open(self._parent)):
                return problem
            self._parent_exists = True
        if problem := run.try_update():
            return problem
        if self._parent and self._parent_status != run.status:
            if problem := parent_run.update_parent(self._parent, publish=self._publish, notifies=True):
                return problem
            self._parent_status = run.status
        return ""


def close_if_dead(rundir: RunDir) -> State:
    """Set the status to ``killed`` if it is ``running`` but the local worker is dead; returns the state."""
    state = rundir.read_state()
    if state.status == "running" and _is_here(state) and not rundir.is_alive():
        with rundir.held() as is_held:
            if is_held and rundir.read_state().status == "running":
                state = rundir.write_state(status="killed", reason=DIED)
    return state


def _is_here(state: State) -> bool:
    """Whether the run is on this machine; workers of other machines cannot be checked."""
    return state.host in ("", os.uname().nodename)


@contextlib.contextmanager
def only_one(lock: Path, wait: bool) -> Iterator[bool]:
    """Acquire the lock file exclusively. Yields False if it is held by another process, or the folder is gone."""
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


def lower_priority() -> None:
    """Lower the CPU priority of this process. Call it once no submitter waits for this process."""
    with contextlib.suppress(OSError):
        os.nice(5)  # at 10 the process got no CPU time for minutes if all cores were busy


def say(text: str, rundir: RunDir | None = None) -> None:
    """Print one line with the time, for mirror.log."""
    where = f"{rundir.path.name}: " if rundir else ""
    print(time.strftime("%F %T"), where + redact(text), flush=True)


def _has_started(rundir: RunDir, since: float) -> bool:
    """Wait until the worker trains; False if it ends before (the run was refused: nothing to upload)."""
    with imports.uncollected():
        import mlflow  # noqa: F401 - takes seconds: import it while the worker imports torch

    while rundir.path.exists():
        state = rundir.read_state()
        if state.status == "running" or (state.status in ENDED and state.updated != since):
            return True
        if not rundir.is_alive():
            return state.status in ENDED
        time.sleep(POLL_S)
    return False


def _samples(run: MlflowRun, gpus: str | None) -> Iterator[None]:
    """Each ``next`` appends a sample of the system metrics to system.jsonl if one is due."""
    if not run.tracking.system_metrics:
        while True:
            yield
    rundir, sampler = run.rundir, Sampler(run.rundir.path, gpus)
    step = max((record["step"] for record in tail(rundir.system, 0)[0]), default=-1) + 1
    due = time.monotonic()
    while True:
        if time.monotonic() >= due:
            due = time.monotonic() + run.tracking.system_interval_s
            with contextlib.suppress(OSError, DamagedError):  # a full disk: samples are not essential
                append_to(rundir.system, {"step": step, "time": time.time(), **sampler.sample(rundir.read_state().pid)})
                step += 1
        yield


@functools.cache
def _installed() -> dict[str, str]:
    versions = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return dict(sorted(versions.items(), key=lambda item: str(item[0]).lower()))
