"""The MLflow runs of a sweep: a parent run with one child run per job, created before the first job starts.

All functions are idempotent and safe in concurrent processes: under the sweep's lock they create what is missing.
Runs are found by the tags ``runner.id`` and ``runner.sweep_id``, which are set at creation: so neither a crash nor a
second process creates a run twice. A process that runs the sweep restores a parent run that was deleted in MLflow, so
that its id stays valid; ``sync`` leaves it deleted and reports this.
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
"""Concurrent calls to a server, which answers in 20 to 100 ms; sqlite allows one writer at a time."""
log = logging.getLogger("runner")

Publish = Callable[["MlflowClient", "Run", SweepDir, Sequence[RunDir], Sequence[State]], None]
"""Writes the results of an ended sweep to its parent run: (client, parent run, sweep, run folders, their states)."""


@dataclass(frozen=True)
class Job:
    """One run of the sweep, in the same store as its parent run."""

    rundir: RunDir
    manifest: dict[str, Any]
    tracking: Tracking
    uri: str
    outputs_dir: str

    @property
    def recorded(self) -> dict[str, Any]:
        """Ids of its MLflow run in this store, from the manifest; empty if there are none."""
        return _recorded(self.manifest, self.uri)


def open_sweep(
    sweep: SweepDir, uri: str | None = None, *, queued: bool | None = None, offline: bool = False, restore: bool = True
) -> str:
    """Create or find the parent run and a child run per job, and record their ids.

    Args:
        uri: a store to use instead of the configured one.
        queued: whether a queue or scheduler will start the pending runs; None: find out.
        offline: include runs with ``tracking=offline``.
        restore: restore a deleted parent run.

    Returns:
        a problem that does not prevent training; empty if none.

    Raises:
        Exception: any exception of a store that does not answer.
    """
    with locked(sweep.mlflow_lock):
        jobs = _jobs(sweep, uri, offline)
        if not jobs:
            return ""
        client, manifest = store.connect(jobs[0].uri), sweep.read()
        experiments = {
            name: store.experiment_id(client, name, artifacts_dir(jobs[0].uri, jobs[0].outputs_dir))
            for name in dict.fromkeys(job.tracking.experiment for job in jobs)
        }
        parent = _parent(client, experiments[jobs[0].tracking.experiment], jobs[0], sweep, manifest)
        problem = _revive(client, parent, restore)
        _make_children(client, experiments, parent.info.run_id, jobs, manifest)
        ids = where(jobs[0].uri, parent)
        recorded = {"parent_run_id": ids.pop("run_id"), **ids}
        if manifest.get("mlflow") != recorded:
            sweep.update(mlflow=recorded)
        if not problem:
            rundirs = sweep.rundirs()
            states = [rundir.read_state() for rundir in rundirs]
            _send_counts(client, parent.info.run_id, sweep, rundirs, states, queued)
        return problem


def try_open(sweep: SweepDir, uri: str | None = None, **options: bool | None) -> str:
    """Like ``open_sweep``, but returns the error message of an exception too."""
    try:
        return open_sweep(sweep, uri, **options)  # type: ignore[arg-type]
    except Exception as error:  # MLflow stores raise many exception types; training continues without MLflow
        return explained(error, uri or str((sweep.read().get("mlflow") or {}).get("uri") or _uri(sweep)))


def is_open(rundir: RunDir, uri: str) -> bool:
    """Whether the ids of the MLflow run and of its parent run in this store are recorded."""
    recorded = _recorded(rundir.read_manifest(), uri)
    return bool(recorded.get("run_id") and recorded.get("parent_run_id"))


def update_parent(
    sweep: SweepDir,
    *,
    states: Sequence[State] | None = None,
    queued: bool | None = None,
    restore: bool = True,
    publish: Publish | None = None,
) -> str:
    """Update status and counts of the parent run, if there is one, from the states of its runs.

    Args:
        states: the states of all runs; None: read them.
        queued: whether a queue or scheduler will start the pending runs; None: find out.
        restore: restore a deleted parent run.
        publish: called if no run of the sweep is running or pending.

    Returns:
        the error message; empty on success.
    """
    recorded = sweep.read().get("mlflow") or {}
    if not recorded.get("parent_run_id"):
        return ""
    try:
        with locked(sweep.mlflow_lock):
            client = store.connect(recorded["uri"])
            run = client.get_run(recorded["parent_run_id"])
            if problem := _revive(client, run, restore):
                return problem
            rundirs = sweep.rundirs()
            states = list(states) if states is not None else [rundir.read_state() for rundir in rundirs]
            if _send_counts(client, run.info.run_id, sweep, rundirs, states, queued) != "RUNNING" and publish:
                publish(client, run, sweep, rundirs, states)
            return ""
    except Exception as error:
        if not _is_gone(error):
            return explained(error, recorded["uri"])
    # Deleted permanently: create a new one.
    return try_open(sweep, recorded["uri"], queued=queued, offline=True, restore=restore)


def parent_status(states: Collection[State], is_queued: bool) -> str:
    """MLflow status of a sweep whose runs have these states: RUNNING, FINISHED, FAILED or KILLED."""
    counts = Counter(state.status for state in states)
    if counts["running"] or (is_queued and (counts["pending"] or counts["preempted"])):
        return "RUNNING"
    if counts["failed"]:
        return "FAILED"
    return "FINISHED" if counts["completed"] + counts["pruned"] == len(states) else "KILLED"


def _jobs(sweep: SweepDir, uri: str | None, offline: bool) -> list[Job]:
    """The jobs with the same store as the first one; jobs with a damaged folder are skipped."""
    jobs = []
    for rundir in sweep.rundirs():
        try:
            config, manifest = read_config(rundir), rundir.read_manifest()
            tracking = _tracking(json.dumps(config["tracking"], sort_keys=True))
            if manifest.get("id") and (offline or tracking.kind == "mlflow"):
                job_uri = uri or home(rundir, tracking, config["outputs_dir"])
                jobs.append(Job(rundir, manifest, tracking, job_uri, config["outputs_dir"]))
        except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning(f"{rundir.path}: not added to the sweep in MLflow: {error}")
    return [job for job in jobs if job.uri == jobs[0].uri]


@functools.cache
def _tracking(node: str) -> Tracking:
    tracking: Tracking = bind(json.loads(node), "tracking")()
    return tracking


def _uri(sweep: SweepDir) -> str:
    return next((job.uri for job in _jobs(sweep, None, True)), "")


def _recorded(manifest: dict[str, Any], uri: str) -> dict[str, Any]:
    recorded = manifest.get("mlflow") or {}
    return dict(recorded) if recorded.get("uri") == take_credentials(uri)[0] else {}


def _parent(client: MlflowClient, experiment: str, first: Job, sweep: SweepDir, manifest: dict[str, Any]) -> Run:
    recorded_id = _recorded(manifest, first.uri).get("parent_run_id")
    if run := store.find_any_run(client, experiment, manifest["id"], recorded_id):
        return run
    command = (manifest.get("commands") or [[]])[-1]
    tags = {
        "runner.sweep": manifest.get("name"),
        "runner.folder": str(sweep.path),
        "mlflow.source.name": command if isinstance(command, str) else shlex.join(command),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user(),
    }
    name = first.tracking.run_name or str(manifest.get("name") or sweep.path.name)
    return store.create_run(client, experiment, manifest["id"], name, time.time(), tags)


def _revive(client: MlflowClient, parent: Run, restore: bool) -> str:
    """Restore a deleted parent run; if not ``restore``, return a message instead."""
    run_id = parent.info.run_id
    if parent.info.lifecycle_stage == "active":
        return ""
    if not restore:
        return f"the MLflow run {run_id} of this sweep was deleted; restore it: mlflow runs restore --run-id {run_id}"
    client.restore_run(run_id)
    log.warning(f"the MLflow run {run_id} of this sweep was deleted; restored, because the sweep is running")
    return ""


def _make_children(
    client: MlflowClient, experiments: dict[str, str], parent: str, jobs: list[Job], manifest: dict[str, Any]
) -> None:
    """Find or create the child run of each job, below the parent run."""
    missing = [job for job in jobs if not job.recorded.get("run_id") or job.recorded.get("parent_run_id") != parent]
    existing: dict[str, Run] = {}
    if missing:
        runs = store.find_runs(client, list(experiments.values()), SWEEP_TAG, manifest["id"])
        existing = {run.data.tags.get(store.ID_TAG, ""): run for run in runs}

    def make(job: Job) -> None:
        experiment = experiments[job.tracking.experiment]
        run = existing.get(job.manifest["id"]) or _child(client, experiment, parent, job, manifest)
        if run.data.tags.get(PARENT_TAG) != parent and run.info.lifecycle_stage == "active":
            client.set_tag(run.info.run_id, PARENT_TAG, parent)
        note(job.rundir, job.uri, run, parent_run_id=parent)

    pool = ThreadPoolExecutor(CALLS_AT_ONCE if store.is_server(jobs[0].uri) else 1)
    try:
        list(pool.map(make, missing))
    finally:
        pool.shutdown(cancel_futures=True)  # do not call a silent store a thousand times more


def _child(client: MlflowClient, experiment: str, parent: str, job: Job, manifest: dict[str, Any]) -> Run:
    """Create the child run of a job, with the status of the job (SCHEDULED before it starts)."""
    state, identity = job.rundir.read_state(), job.manifest["id"]
    # A run that was uploaded before it became part of this sweep has no sweep tag yet.
    recorded_id = (job.manifest.get("mlflow") or {}).get("run_id")
    if recorded_id and (run := store.find_any_run(client, experiment, identity, recorded_id)):
        upload.send_tags(client, run, {SWEEP_TAG: manifest["id"]})
        return run
    tags = {
        PARENT_TAG: parent,
        SWEEP_TAG: manifest["id"],
        "runner.sweep": manifest.get("name"),
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


def _send_counts(
    client: MlflowClient,
    parent: str,
    sweep: SweepDir,
    rundirs: Sequence[RunDir],
    states: Sequence[State],
    queued: bool | None,
) -> str:
    """Send status and counts of the parent run. Call under the sweep's lock, so that the newest states are sent last.

    Returns:
        the status of the parent run.
    """
    counts = Counter(state.status for state in states)
    run = client.get_run(parent)
    tags = {
        f"runner.jobs_{status}": counts[status] for status in ("completed", "pruned", "failed", "killed", "running")
    }
    pending = counts["pending"] + counts["preempted"]
    upload.send_tags(client, run, {"runner.jobs": len(rundirs), **tags, "runner.jobs_waiting": pending})
    is_queued = bool(pending) and (_is_queued(sweep, rundirs) if queued is None else queued)
    status = parent_status(states, is_queued)
    if status != run.info.status:
        ended = max((state.updated for state in states), default=0.0) or time.time()
        upload.set_status(client, run, status, None if status == "RUNNING" else ended)
        _set_pending(client, rundirs, "SCHEDULED" if is_queued else "KILLED")
    return status


def _set_pending(client: MlflowClient, rundirs: Sequence[RunDir], status: str) -> None:
    """Set the status of runs that have not started: SCHEDULED, or KILLED if no process will start them."""
    for rundir in rundirs:
        run_id = (rundir.read_manifest().get("mlflow") or {}).get("run_id")
        is_pending = rundir.read_state().status == "pending"  # read again: the caller's states may be a second old
        if run_id and is_pending and (run := client.get_run(run_id)).info.status != status:
            upload.set_status(client, run, status, None if status == "SCHEDULED" else time.time())


def _is_queued(sweep: SweepDir, rundirs: Sequence[RunDir]) -> bool:
    """Whether a local queue runs the sweep, or one of its pending runs is submitted to Slurm."""
    if sweep.is_worked_on():
        return True
    pending = (rundir for rundir in rundirs if rundir.read_state().status in ("pending", "preempted"))
    jobs = (rundir.read_manifest().get("slurm") for rundir in pending)
    return any(job and not job.get("has_left") for job in jobs)


def _is_gone(error: Exception) -> bool:
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
