"""Upload one run folder to its MLflow run.

``MlflowRun.update`` is idempotent: it compares the folder with MLflow and sends what is missing. So if an upload
process is killed, the next one continues.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.bind import bind
from runner.errors import DamagedError
from runner.files import write_atomic
from runner.secrets import take_credentials
from runner.tracking import environment, manifest
from runner.tracking.metrics_log import (
    BEST,
    SECONDS,
    last_values,
    lost_of,
    read,
    read_evaluations,
    tail,
)
from runner.tracking.mlflow import store, tags, upload
from runner.tracking.naming import short_name
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DIED, FINAL, State
from runner.tracking.sweepdir import sweep_of
from runner.tracking.trackers import Tracking, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATUS = {
    "pending": "SCHEDULED", "running": "RUNNING", "completed": "FINISHED", "failed": "FAILED", "preempted": "KILLED",
    "killed": "KILLED", "pruned": "KILLED",
}  # fmt: skip
ENDED = (*FINAL, "preempted")
UPLOADED_TAG = "runner.mirrored"
"""Set last: ``updated`` of the final state, once everything up to it is uploaded."""


@dataclass
class MlflowRun:
    """A run folder, its MLflow store, and the progress of the upload."""

    rundir: RunDir
    uri: str
    tracking: Tracking
    config: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)
    """Installed packages of the run's environment; empty if unknown."""
    run: Run | None = None
    status: str = ""
    """Status of the run in MLflow: RUNNING, FINISHED …"""
    known: upload.Known = field(default_factory=dict)
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """File → (its inode, number of bytes already uploaded)."""
    sent: int = 0
    """Number of records of metrics.jsonl that are in MLflow."""
    uploaded: float = 0.0
    """``updated`` of the final state, once everything is uploaded; 0 while the run continues."""
    also: dict[str, str] = field(default_factory=dict)
    """Each tracker of ``tracking.also`` → why it does not have everything; empty if it has."""
    webhook: str = ""
    """Why the message to ``tracking.webhook`` was not sent."""

    @classmethod
    def of(cls, rundir: RunDir, uri: str | None = None) -> MlflowRun:
        """The run of a folder in the store at ``uri``; default: the run's own store (see ``home``)."""
        config = manifest.read_config(rundir)
        tracking = bind(config["tracking"], "tracking")()
        return cls(rundir, uri or home(rundir, tracking, config["outputs_dir"]), tracking, config)

    def update(self) -> None:
        """Upload everything in the folder that MLflow does not have yet."""
        state, client = self.rundir.read_state(), store.connect(self.uri)
        run = self.run = self.run or self._open(client, state, self.rundir.read_manifest())
        manifest, ended = self.rundir.read_manifest(), state.status in ENDED
        if not ended:
            self._send_status(client, run, state)
        upload.send_tags(client, run, tags.of_run(self.rundir, manifest, state))
        upload.send_dataset(client, run, manifest.get("data") or {})
        for path in (self.rundir.metrics, self.rundir.system):
            self._send_records(client, run, path)
        self._send_evaluations(client, run)
        self._send_answers(client, run)
        try:
            if ended and run.data.tags.get(UPLOADED_TAG) != str(state.updated):
                self._send_results(client, run)
                upload.send_tags(client, run, {UPLOADED_TAG: str(state.updated)})
        finally:  # even if the upload of the model fails, the run does not stay RUNNING
            self._send_status(client, run, state)
        self.uploaded = state.updated if ended else 0.0

    def try_update(self, *, closes_doubles: bool = False) -> str:
        """Like ``update``, but returns the error message; empty on success. ``closes_doubles``: see there."""
        try:
            self.update()
            if closes_doubles:
                self.close_doubles()
        except Exception as error:  # MLflow stores raise many exception types; none may end the upload process
            self.run, self.positions = None, {}  # compare everything with MLflow again
            return store.explained(error, self.uri)
        return ""

    def try_close(self, reason: str) -> str:
        """End a run in MLflow whose folder is gone, as killed; returns the error message, empty on success."""
        try:
            if self.run and self.status == "RUNNING":
                client = store.connect(self.uri)
                upload.send_tags(client, self.run, {"runner.status": "killed", "runner.reason": reason})
                upload.set_status(client, self.run, "KILLED", time.time())
        except Exception as error:
            return store.explained(error, self.uri)
        return ""

    def report(self, problem: str) -> int:
        """Write the progress to mirror.json; returns the number of records that are not in MLflow."""
        unsent = max(0, len(read(self.rundir)) - self.sent)
        if self.rundir.path.exists():
            report = {"sent": self.sent, "unsent": unsent, "problem": problem, "uploaded": self.uploaded}
            report |= {name: value for name, value in (("also", self.also), ("webhook", self.webhook)) if value}
            write_atomic(self.rundir.mirror_report, json.dumps(report))
        return unsent

    def _open(self, client: MlflowClient, state: State, manifest: dict[str, Any]) -> Run:
        """Find or create the run, and send what does not change: params, config, manifest, environment."""
        parent = parent_of(self.rundir, self.uri)
        artifacts = artifacts_dir(self.uri, self.config["outputs_dir"])
        experiment = store.experiment_id(client, self.tracking.experiment, artifacts)
        identity = str(manifest.get("id") or self.rundir.path)
        run = store.find_run(client, experiment, identity, (manifest.get("mlflow") or {}).get("run_id"))
        if run is None:
            name = self.tracking.run_name or short_name(manifest) or self.rundir.path.name
            started = state.started or (state.updated if state.status in ENDED else time.time())
            initial = {**tags.of_user(self.tracking), **tags.of_run(self.rundir, manifest, state)}
            initial[tags.PARENT_TAG] = parent.get("parent_run_id")
            run = store.create_run(client, experiment, identity, name, started, initial)
        note(self.rundir, self.uri, run, **parent)
        upload.send_params(client, run, self.config, manifest.get("choices"))
        for path in (self.rundir.config, self.rundir.manifest, self.rundir.dirty_diff):
            if path.exists():
                client.log_artifact(run.info.run_id, str(path))
        if self.rundir.code.is_dir():
            client.log_artifacts(run.info.run_id, str(self.rundir.code), self.rundir.code.name)
        environment = {"versions": manifest.get("versions") or {}, "packages": self.packages}
        client.log_text(run.info.run_id, json.dumps(environment, indent=1), "environment.json")
        self.known, self.status = upload.known_steps(client, run), run.info.status
        return run

    def _send_records(self, client: MlflowClient, run: Run, path: Path) -> None:
        if not path.exists():
            return
        inode, (before, offset) = path.stat().st_ino, self.positions.get(path, (0, 0))
        # Another inode: truncated by a resume. Shorter: cut off by somebody. Read all of it again.
        offset = offset if inode == before and path.stat().st_size >= offset else 0
        records, end = tail(path, offset)
        upload.send_metrics(client, run, records, self.known)
        self.positions[path] = inode, end
        if path == self.rundir.metrics:
            self.sent = (self.sent if offset else 0) + len(records)

    def _send_evaluations(self, client: MlflowClient, run: Run) -> None:
        """Results of the command ``evaluate``; a step may have several, which differ in time."""
        path = self.rundir.evaluations
        position = (path.stat().st_ino, path.stat().st_size) if path.exists() else None
        if position is None or self.positions.get(path) == position:
            return
        upload.send_evaluations(client, run, read_evaluations(self.rundir))
        client.log_artifact(run.info.run_id, str(path))
        self.positions[path] = position

    def _send_answers(self, client: MlflowClient, run: Run) -> None:
        """The answers of each evaluation as tables; those that a resumed run writes again are sent again."""
        for folder in (self.rundir.answers, self.rundir.rollouts):
            for path in sorted(folder.glob("step-*.json")):
                position = (path.stat().st_ino, path.stat().st_size)
                if self.positions.get(path) != position:
                    upload.send_table(client, run, json.loads(path.read_text()), f"{folder.name}/{path.name}")
                    self.positions[path] = position

    def _send_status(self, client: MlflowClient, run: Run, state: State) -> None:
        if self.status == STATUS[state.status]:
            return
        # A killed worker wrote no end time: use the time of its last record, not the time of the status query.
        was_killed = state.reason == DIED and self.rundir.metrics.exists()
        ended_at = self.rundir.metrics.stat().st_mtime if was_killed else state.updated
        upload.set_status(client, run, STATUS[state.status], ended_at if state.status in ENDED else None)
        self.status = STATUS[state.status]

    def _send_results(self, client: MlflowClient, run: Run) -> None:
        """Send the results of a finished run: log, manifest, samples as a table, and the model (``log_model``)."""
        for path in (self.rundir.manifest, self.rundir.log):
            if path.exists():
                client.log_artifact(run.info.run_id, str(path))
        if self.rundir.profile.is_dir():
            client.log_artifacts(run.info.run_id, str(self.rundir.profile), self.rundir.profile.name)
        with contextlib.suppress(OSError, ValueError):  # lost or damaged: the worker reports it
            upload.send_table(client, run, json.loads(self.rundir.samples.read_text()), self.rundir.samples.name)
        self._send_summary(client, run)
        self.close_doubles()
        log_model, is_adapter = self.tracking.log_model, (self.rundir.model / "adapter_config.json").exists()
        if self.rundir.model.is_dir() and (log_model is True or (log_model == "adapter" and is_adapter)):
            client.log_artifacts(run.info.run_id, str(self.rundir.model), self.rundir.model.name)
            model = self.rundir.read_manifest().get("model") or {}
            params = {"base": str(model.get("path")), "revision": str(model.get("revision"))}
            kind, step = "adapter" if is_adapter else "model", self.rundir.read_state().model_step
            upload.send_model(client, run, str(model.get("name") or "model"), kind, params, step)

    def close_doubles(self) -> None:
        """Close runs and models that a repeated request created besides those of this run."""
        client, identity = store.connect(self.uri), self.rundir.read_manifest().get("id")
        if self.run and identity and store.is_server(self.uri):
            store.close_doubles(client, self.run, str(identity))
            if hasattr(client, "search_logged_models"):  # added in MLflow 3
                upload.delete_double_models(client, self.run)

    def _send_summary(self, client: MlflowClient, run: Run) -> None:
        """Send the metrics that no record contains and ``compare`` uses: best eval loss and training seconds."""
        from mlflow.entities import Metric

        state = self.rundir.read_state()
        records = read(self.rundir)
        is_complete = not lost_of(self.rundir.read_state(), records, self.config)
        best = last_values(records).get(BEST) if is_complete else None
        summary = {BEST: best, SECONDS: state.seconds or None}
        now_ms = int(state.updated * 1000)
        points = [Metric(name, value, now_ms, state.step) for name, value in summary.items() if value is not None]
        if points:
            client.log_batch(run.info.run_id, metrics=points)


def home(rundir: RunDir, tracking: Tracking, outputs_dir: str | Path) -> str:
    """URI of the store of a run: the configured one; with ``tracking=offline`` the one it was uploaded to, if any,
    else the one of the environment (``MLFLOW_TRACKING_URI``).
    """
    if tracking.kind == "offline":
        with contextlib.suppress(OSError, ValueError):  # a damaged manifest is reported elsewhere
            recorded = str((rundir.read_manifest().get("mlflow") or {}).get("uri") or "")
            if recorded and store.is_there(recorded):
                return recorded
        if uri := environment.store_uri():
            return manifest.credentials_into_environment(uri)
    return store_uri(tracking, outputs_dir)


def artifacts_dir(uri: str, outputs_dir: str | Path) -> Path | None:
    """Artifact folder of the embedded store; None if a server decides."""
    return None if store.is_server(uri) else Path(outputs_dir, "mlartifacts")


def note(rundir: RunDir, uri: str, run: Run, **more: Any) -> None:
    """Record the ids of the MLflow run in the manifest; a recorded parent run in another store is removed."""
    recorded = rundir.read_manifest().get("mlflow") or {}
    ids = where(uri, run)
    same_store = recorded if recorded.get("uri", ids["uri"]) == ids["uri"] else {}
    if (updated := {**same_store, **ids, **more}) != recorded:
        rundir.update_manifest(mlflow=updated)


def parent_of(rundir: RunDir, uri: str) -> dict[str, str]:
    """{parent_run_id} of a run whose sweep has a parent run in this store; else empty."""
    sweep, recorded = sweep_of(rundir), dict[str, Any]()
    with contextlib.suppress(DamagedError):  # sync reports it
        recorded = (sweep.read().get("mlflow") or {}) if sweep else {}
    is_here = recorded.get("parent_run_id") and recorded.get("uri") == take_credentials(uri)[0]
    return {"parent_run_id": str(recorded["parent_run_id"])} if is_here else {}


def where(uri: str, run: Run) -> dict[str, Any]:
    """Entry for the manifest: {run_id, experiment_id, uri, url}; ``url``: page of the run on a server, else None."""
    uri, _, _ = take_credentials(uri)
    run_id, experiment = run.info.run_id, run.info.experiment_id
    url = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}" if store.is_server(uri) else None
    return {"run_id": run_id, "experiment_id": experiment, "uri": uri, "url": url}
