"""The parent run of a sweep in MLflow.

The run of a job is created below it when the job starts (``MlflowRun``): MLflow cannot change a start time later.

All functions are idempotent and safe in concurrent processes: under the sweep's lock they create what is missing. The
parent run is found by the tag ``runner.id``, which is set at creation: so neither a crash nor a second process creates
it twice. A process that runs the sweep restores a parent run that was deleted in MLflow, so that its id stays valid;
``sync`` leaves it deleted and reports this.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.config.bind import bind
from runner.errors import DamagedError, RunnerError
from runner.files import is_held, locked
from runner.secrets import take_credentials
from runner.tracking import sweep_manifest, webhook
from runner.tracking.machine import user
from runner.tracking.manifest import read_config
from runner.tracking.mlflow import store, upload
from runner.tracking.mlflow.place import artifacts_dir, home, note, parent_of, where
from runner.tracking.mlflow.tags import KIND_TAG, PARENT_TAG, of_user, source_name
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir
from runner.tracking.trackers import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("runner")

Publish = Callable[["MlflowClient", "Run", SweepDir, Sequence[RunDir], Sequence[State], bool], None]
"""Writes the results of a sweep to its parent run: (client, parent run, sweep, run folders, their states, ended)."""


@dataclass(frozen=True)
class Job:
    """One run of the sweep, with the settings of its upload."""

    tracking: Tracking
    uri: str
    outputs_dir: str


def open_sweep(
    sweep: SweepDir, uri: str | None = None, *, queued: bool | None = None, offline: bool = False, restore: bool = True
) -> str:
    """Create or find the parent run, and record its id.

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
        first = next(_jobs(sweep, uri, offline), None)
        if first is None:
            return ""
        client, manifest = store.connect(first.uri), sweep.read()
        artifacts = artifacts_dir(first.uri, first.outputs_dir)
        experiment = store.experiment_id(client, first.tracking.experiment, artifacts)
        parent = _parent(client, experiment, first, sweep, manifest)
        problem = _revive(client, parent, restore)
        ids = where(first.uri, parent)
        recorded = {"parent_run_id": ids.pop("run_id"), **ids}
        rundirs = sweep.rundirs()
        if manifest.get("mlflow") != recorded:
            sweep.update(mlflow=recorded)
            _adopt(client, rundirs, first.uri)
        if not problem:
            upload.send_params(client, parent, {}, sweep_manifest.swept(manifest))
            _send_counts(client, parent.info.run_id, sweep, rundirs, [_state(rundir) for rundir in rundirs], queued)
        return problem


def try_open(sweep: SweepDir, uri: str | None = None, **options: bool | None) -> str:
    """Like ``open_sweep``, but returns the error message of an exception too."""
    try:
        return open_sweep(sweep, uri, **options)  # type: ignore[arg-type]
    except Exception as error:  # MLflow stores raise many exception types; training continues without MLflow
        if isinstance(error, DamagedError):
            return str(error)
        return store.explained(error, uri or str((sweep.read().get("mlflow") or {}).get("uri") or _uri(sweep)))


def is_open(sweep: SweepDir, uri: str) -> bool:
    """Whether a parent run in this store is recorded."""
    return bool(_recorded(sweep.read(), uri).get("parent_run_id"))


def update_parent(
    sweep: SweepDir,
    *,
    states: Sequence[State] | None = None,
    queued: bool | None = None,
    restore: bool = True,
    publish: Publish | None = None,
    notifies: bool = False,
) -> str:
    """Update status and counts of the parent run, if there is one, from the states of its runs.

    Args:
        states: the states of all runs; None: read them.
        queued: whether a queue or scheduler will start the pending runs; None: find out.
        restore: restore a deleted parent run.
        publish: writes the results to the parent run.
        notifies: send the message about the end of the sweep, if this is the update that ends it.

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
            states = list(states) if states is not None else [_state(rundir) for rundir in rundirs]
            status = _send_counts(client, run.info.run_id, sweep, rundirs, states, queued)
            if notifies and status != "RUNNING" and run.info.status == "RUNNING" and not is_held(sweep.search_lock):
                notify(sweep, status, states)
            if publish:
                publish(client, run, sweep, rundirs, states, status != "RUNNING")
            return ""
    except Exception as error:
        if not _is_gone(error):
            return store.explained(error, recorded["uri"])
    # Deleted permanently: create a new one.
    return try_open(sweep, recorded["uri"], queued=queued, offline=True, restore=restore)


def notify(sweep: SweepDir, status: str, states: Sequence[State]) -> None:
    """Send the message about the end of a sweep to the webhook of its runs. ``status``: see ``parent_status``."""
    first = next(_jobs(sweep, None, False), None)
    if first and (problem := webhook.notify(first.tracking.webhook, webhook.of_sweep(sweep, status, states))):
        log.warning(f"webhook {problem}")


def parent_status(states: Collection[State], is_queued: bool) -> str:
    """MLflow status of a sweep whose runs have these states: RUNNING, FINISHED, FAILED or KILLED."""
    counts = Counter(state.status for state in states)
    if counts["running"] or (is_queued and (counts["pending"] or counts["preempted"])):
        return "RUNNING"
    if counts["failed"]:
        return "FAILED"
    return "FINISHED" if counts["completed"] + counts["pruned"] == len(states) else "KILLED"


def _jobs(sweep: SweepDir, uri: str | None, offline: bool) -> Iterator[Job]:
    """The jobs that are uploaded; jobs with a damaged folder are skipped."""
    for rundir in sweep.rundirs():
        try:
            config = read_config(rundir)
            tracking = _tracking(json.dumps(config["tracking"], sort_keys=True))
            if offline or tracking.kind == "mlflow":
                yield Job(tracking, uri or home(rundir, tracking, config["outputs_dir"]), config["outputs_dir"])
        except (RunnerError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning(f"{rundir.path}: not added to the sweep in MLflow: {error}")


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
    if manifest.get("is_rebuilt"):
        known = store.with_id(client, recorded_id)
        manifest["id"] = known.data.tags.get(store.ID_TAG, manifest["id"]) if known else manifest["id"]
        sweep.update(id=manifest["id"], is_rebuilt=False)
    if run := store.find_any_run(client, experiment, manifest["id"], recorded_id):
        return run
    command = (manifest.get("commands") or [[]])[-1]
    tags = {
        **of_user(first.tracking),
        KIND_TAG: "sweep",
        "runner.sweep": manifest.get("name"),
        "runner.folder": str(sweep.path),
        "mlflow.source.name": source_name(command),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user(),
    }
    name = first.tracking.run_name or str(manifest.get("name") or sweep.path.name)
    started = float(manifest.get("created") or time.time())
    return store.create_run(client, experiment, manifest["id"], name, started, tags)


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


def _adopt(client: MlflowClient, rundirs: Sequence[RunDir], uri: str) -> None:
    """Move runs that are in this store already below a new parent run."""
    for rundir in rundirs:
        with contextlib.suppress(DamagedError):
            recorded = _recorded(rundir.read_manifest(), uri)
            parent = parent_of(rundir, uri) if recorded.get("run_id") else recorded
            if recorded.get("parent_run_id") != parent.get("parent_run_id"):
                run = client.get_run(recorded["run_id"])
                if run.info.lifecycle_stage == "active":
                    client.set_tag(run.info.run_id, PARENT_TAG, parent["parent_run_id"])
                note(rundir, uri, run, **parent)


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
    return status


def _is_queued(sweep: SweepDir, rundirs: Sequence[RunDir]) -> bool:
    """Whether a local queue runs the sweep, or one of its pending runs is submitted to Slurm."""
    if sweep.is_worked_on():
        return True
    pending = (rundir for rundir in rundirs if _state(rundir).status in ("pending", "preempted"))
    jobs = (rundir.read_manifest().get("slurm") for rundir in pending)
    return any(job and not job.get("has_left") for job in jobs)


def _state(rundir: RunDir) -> State:
    """The state of a run; a damaged one counts as killed: the run can be resumed."""
    try:
        return rundir.read_state()
    except DamagedError:
        return State(status="killed")


def _is_gone(error: Exception) -> bool:
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
