"""A sweep in MLflow: one parent run, and below it a child for each job, made before the first job starts.

Everything here may be called at any time by any process: under the sweep's lock it looks at what there is, and adds
what is missing. Runs are told by tags (``runner.id``, ``runner.sweep_id``) that they bear from the moment they are
made, so that neither a crash nor a second process makes one twice. A parent that was deleted in MLflow is restored by
whoever works on the sweep: ids that were given out stay true. ``sync`` leaves it deleted, and says so.
"""

from __future__ import annotations

import functools
import json
import logging
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.config.bind import bind
from runner.errors import RunnerError
from runner.files import locked
from runner.secrets import take_credentials
from runner.tracking.machine import user
from runner.tracking.manifest import read_config
from runner.tracking.mlflow import store, upload
from runner.tracking.mlflow.run import ENDED, STATUS, artifacts_dir, explained, home, note, where
from runner.tracking.rundir import RunDir, State
from runner.tracking.sweepdir import SweepDir
from runner.tracking.trackers import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG, SWEEP_TAG = "mlflow.parentRunId", "runner.sweep_id"
CALLS_AT_ONCE = 8
"""To a server, which answers each after 20 to 100 ms; a sqlite database takes one writer at a time."""
log = logging.getLogger("runner")

Publish = Callable[["MlflowClient", "Run", SweepDir, Sequence[RunDir], Sequence[State]], None]
"""Writes the results of a sweep that has ended onto its parent run: (client, parent run, sweep, runs, their states)."""


@dataclass(frozen=True)
class Job:
    """One run of the sweep that goes into the same store as its parent."""

    rundir: RunDir
    manifest: dict[str, Any]
    tracking: Tracking
    uri: str
    outputs_dir: str

    @property
    def noted(self) -> dict[str, Any]:
        """What the manifest says of its run in this store; empty where it has none."""
        return _noted(self.manifest, self.uri)


def open_sweep(
    sweep: SweepDir, uri: str | None = None, *, queued: bool | None = None, offline: bool = False, restore: bool = True
) -> str:
    """Make or find the parent and a child for each job that has none, and note their ids.

    Args:
        uri: another store than the configurations name.
        queued: whether somebody will start what has not begun; None: see for yourself.
        offline: runs of ``tracking=offline`` too.
        restore: bring back a parent that was deleted.

    Returns:
        what is wrong without being in the way; empty when nothing is.

    Raises:
        Exception: whatever a store that does not answer raises.
    """
    with locked(sweep.mlflow_lock):
        jobs = _jobs(sweep, uri, offline)
        if not jobs:
            return ""
        client, said = store.connect(jobs[0].uri), sweep.read()
        experiments = {
            name: store.experiment_id(client, name, artifacts_dir(jobs[0].uri, jobs[0].outputs_dir))
            for name in dict.fromkeys(job.tracking.experiment for job in jobs)
        }
        parent = _parent(client, experiments[jobs[0].tracking.experiment], jobs[0], sweep, said)
        problem = _revive(client, parent, restore)
        _make_children(client, experiments, parent.info.run_id, jobs, said)
        here = where(jobs[0].uri, parent)
        noted = {"parent_run_id": here.pop("run_id"), **here}
        if said.get("mlflow") != noted:
            sweep.update(mlflow=noted)
        if not problem:
            rundirs = sweep.rundirs()
            _bring_up_to_date(
                client, parent.info.run_id, sweep, rundirs, [rundir.read_state() for rundir in rundirs], queued
            )
        return problem


def try_open(sweep: SweepDir, uri: str | None = None, **how: bool | None) -> str:
    """``open_sweep``, with what went wrong as a text; empty when nothing did."""
    try:
        return open_sweep(sweep, uri, **how)  # type: ignore[arg-type]
    except Exception as error:  # a store fails in a hundred ways; training goes on without it
        return explained(error, uri or str((sweep.read().get("mlflow") or {}).get("uri") or _uri(sweep)))


def is_open(rundir: RunDir, uri: str) -> bool:
    """Whether the run of a sweep has its run and its parent in this store."""
    noted = _noted(rundir.read_manifest(), uri)
    return bool(noted.get("run_id") and noted.get("parent_run_id"))


def update_parent(
    sweep: SweepDir,
    *,
    states: Sequence[State] | None = None,
    queued: bool | None = None,
    restore: bool = True,
    publish: Publish | None = None,
) -> str:
    """Bring the parent's status and counts up to what its jobs say, if MLflow has one.

    Args:
        states: of all its runs; read if they are not given.
        queued: whether somebody will start what has not begun, as the scheduler says; None: see for yourself.
        restore: bring the parent back if it was deleted.
        publish: called once no run of the sweep runs or waits.

    Returns:
        what went wrong; empty when nothing did.
    """
    noted = sweep.read().get("mlflow") or {}
    if not noted.get("parent_run_id"):
        return ""
    try:
        with locked(sweep.mlflow_lock):
            client = store.connect(noted["uri"])
            run = client.get_run(noted["parent_run_id"])
            if problem := _revive(client, run, restore):
                return problem
            rundirs = sweep.rundirs()
            found = list(states) if states is not None else [rundir.read_state() for rundir in rundirs]
            if _bring_up_to_date(client, run.info.run_id, sweep, rundirs, found, queued) != "RUNNING" and publish:
                publish(client, run, sweep, rundirs, found)
            return ""
    except Exception as error:
        if not _is_gone(error):
            return explained(error, noted["uri"])
    return try_open(sweep, noted["uri"], queued=queued, offline=True, restore=restore)  # deleted for good


def parent_status(states: Collection[State], is_queued: bool) -> str:
    """What MLflow shows of a sweep whose runs are in these states: RUNNING, FINISHED, FAILED or KILLED."""
    found = Counter(state.status for state in states)
    if found["running"] or (is_queued and (found["pending"] or found["preempted"])):
        return "RUNNING"
    if found["failed"]:
        return "FAILED"
    return "FINISHED" if found["completed"] + found["pruned"] == len(states) else "KILLED"


def _jobs(sweep: SweepDir, uri: str | None, offline: bool) -> list[Job]:
    """The jobs of the store that the first of them names; one whose folder is damaged is left out."""
    jobs = []
    for rundir in sweep.rundirs():
        try:
            config, manifest = read_config(rundir), rundir.read_manifest()
            tracking = _tracking(json.dumps(config["tracking"], sort_keys=True))
            if manifest.get("id") and (offline or tracking.kind == "mlflow"):
                place = uri or home(rundir, tracking, config["outputs_dir"])
                jobs.append(Job(rundir, manifest, tracking, place, config["outputs_dir"]))
        except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning(f"{rundir.path}: left out of the sweep in MLflow: {error}")
    return [job for job in jobs if job.uri == jobs[0].uri]


@functools.cache
def _tracking(node: str) -> Tracking:
    made: Tracking = bind(json.loads(node), "tracking")()
    return made


def _uri(sweep: SweepDir) -> str:
    return next((job.uri for job in _jobs(sweep, None, True)), "")


def _noted(manifest: dict[str, Any], uri: str) -> dict[str, Any]:
    noted = manifest.get("mlflow") or {}
    return dict(noted) if noted.get("uri") == take_credentials(uri)[0] else {}


def _parent(client: MlflowClient, experiment: str, first: Job, sweep: SweepDir, said: dict[str, Any]) -> Run:
    noted = _noted(said, first.uri).get("parent_run_id")
    if found := store.find_any_run(client, experiment, said["id"], noted):
        return found
    command = (said.get("commands") or [[]])[-1]
    tags = {
        "runner.sweep": said.get("name"),
        "runner.folder": str(sweep.path),
        "mlflow.source.name": command if isinstance(command, str) else shlex.join(command),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user(),
    }
    name = first.tracking.run_name or str(said.get("name") or sweep.path.name)
    return store.create_run(client, experiment, said["id"], name, time.time(), tags)


def _revive(client: MlflowClient, parent: Run, restore: bool) -> str:
    """Restore a parent that was deleted; returns what to say where that is not wanted."""
    run_id = parent.info.run_id
    if parent.info.lifecycle_stage == "active":
        return ""
    if not restore:
        return f"the MLflow run {run_id} of this sweep was deleted; mlflow runs restore --run-id {run_id}"
    client.restore_run(run_id)
    log.warning(f"the MLflow run {run_id} of this sweep had been deleted: restored, as the sweep is at work")
    return ""


def _make_children(
    client: MlflowClient, experiments: dict[str, str], parent: str, jobs: list[Job], said: dict[str, Any]
) -> None:
    """Give each job its run below the parent: the one that is noted, one that was made before, or a new one."""
    todo = [job for job in jobs if not job.noted.get("run_id") or job.noted.get("parent_run_id") != parent]
    there: dict[str, Run] = {}
    if todo:
        found = store.find_runs(client, list(experiments.values()), SWEEP_TAG, said["id"])
        there = {run.data.tags.get(store.ID_TAG, ""): run for run in found}

    def make(job: Job) -> None:
        run = there.get(job.manifest["id"]) or _child(client, experiments[job.tracking.experiment], parent, job, said)
        if run.data.tags.get(PARENT_TAG) != parent and run.info.lifecycle_stage == "active":
            client.set_tag(run.info.run_id, PARENT_TAG, parent)
        note(job.rundir, job.uri, run, parent_run_id=parent)

    pool = ThreadPoolExecutor(CALLS_AT_ONCE if store.is_server(jobs[0].uri) else 1)
    try:
        list(pool.map(make, todo))
    finally:
        pool.shutdown(cancel_futures=True)  # a store that fell silent is not asked a thousand times more


def _child(client: MlflowClient, experiment: str, parent: str, job: Job, said: dict[str, Any]) -> Run:
    """A new run for a job, in the state that the job is in: SCHEDULED before it begins."""
    state, identity = job.rundir.read_state(), job.manifest["id"]
    # One that was synced before it was part of this parent bears no tag of the sweep.
    noted = job.noted.get("run_id") or (job.manifest.get("mlflow") or {}).get("run_id")
    if noted and (found := store.find_any_run(client, experiment, identity, noted)):
        upload.send_tags(client, found, {SWEEP_TAG: said["id"]})
        return found
    tags = {
        PARENT_TAG: parent,
        SWEEP_TAG: said["id"],
        "runner.sweep": said.get("name"),
        "runner.signature": job.manifest.get("signature"),
        "runner.status": state.status,
        "runner.folder": str(job.rundir.path),
    }
    name = str(job.manifest.get("name") or job.rundir.path.name)
    ended = state.updated if state.status in ENDED else None
    run = store.create_run(client, experiment, identity, name, state.started or ended or time.time(), tags)
    if STATUS[state.status] != run.info.status:
        upload.set_status(client, run, STATUS[state.status], ended)
    return run


def _bring_up_to_date(
    client: MlflowClient,
    parent: str,
    sweep: SweepDir,
    rundirs: Sequence[RunDir],
    states: Sequence[State],
    queued: bool | None,
) -> str:
    """Send the parent's status and counts; under the lock, so that what is sent last is what was read last.

    Returns:
        the status of the parent.
    """
    counts = Counter(state.status for state in states)
    run = client.get_run(parent)
    counted = {
        f"runner.jobs_{status}": counts[status] for status in ("completed", "pruned", "failed", "killed", "running")
    }
    waiting = counts["pending"] + counts["preempted"]
    upload.send_tags(client, run, {"runner.jobs": len(rundirs), **counted, "runner.jobs_waiting": waiting})
    is_queued = bool(waiting) and (_is_queued(sweep, rundirs) if queued is None else queued)
    status = parent_status(states, is_queued)
    if status != run.info.status:
        ended = max((state.updated for state in states), default=0.0) or time.time()
        upload.set_status(client, run, status, None if status == "RUNNING" else ended)
        _say_of_waiting(client, rundirs, "SCHEDULED" if is_queued else "KILLED")
    return status


def _say_of_waiting(client: MlflowClient, rundirs: Sequence[RunDir], status: str) -> None:
    """Of jobs that have not begun say whether they will: SCHEDULED, or KILLED where nobody is left to start them."""
    for rundir in rundirs:
        run_id = (rundir.read_manifest().get("mlflow") or {}).get("run_id")
        has_begun = rundir.read_state().status != "pending"  # what the caller knows may be a second old
        if run_id and not has_begun and (run := client.get_run(run_id)).info.status != status:
            upload.set_status(client, run, status, None if status == "SCHEDULED" else time.time())


def _is_queued(sweep: SweepDir, rundirs: Sequence[RunDir]) -> bool:
    """Whether a queue is at work here, or a scheduler was given one of those that wait."""
    if sweep.is_worked_on():
        return True
    waiting = (rundir for rundir in rundirs if rundir.read_state().status in ("pending", "preempted"))
    jobs = (rundir.read_manifest().get("slurm") for rundir in waiting)
    return any(job and not job.get("has_left") for job in jobs)


def _is_gone(error: Exception) -> bool:
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
