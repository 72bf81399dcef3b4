"""The MLflow run of a run folder: what it says is what the folder says.

``MlflowRun.update`` may be called at any time, again and again, by one process after another: it looks at what MLflow
has and sends the rest. So nothing depends on a process that lives to the end.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.bind import bind
from runner.errors import RunnerError
from runner.files import write_atomic
from runner.secrets import redact, take_credentials
from runner.tracking import manifest
from runner.tracking.machine import user
from runner.tracking.metrics_log import BEST, SECONDS, last_values, read, read_evaluations, tail
from runner.tracking.mlflow import store, upload
from runner.tracking.rundir import DIED, FINAL, RunDir, State
from runner.tracking.trackers import Tracking, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATUS = {
    "pending": "SCHEDULED", "running": "RUNNING", "completed": "FINISHED", "failed": "FAILED", "preempted": "KILLED",
    "killed": "KILLED", "pruned": "KILLED",
}  # fmt: skip
ENDED = (*FINAL, "preempted")
TOLD_TAG = "runner.mirrored"
"""Set last: the time stamp of the state up to which MLflow has everything."""


@dataclass
class MlflowRun:
    """One run folder, the store it is mirrored into, and how far that got."""

    rundir: RunDir
    uri: str
    tracking: Tracking
    config: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)
    """What is installed where the run runs; empty where that is not known."""
    run: Run | None = None
    status: str = ""
    """What MLflow says of the run: RUNNING, FINISHED …"""
    known: upload.Known = field(default_factory=dict)
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """File → its inode, and the bytes of it that MLflow has."""
    sent: int = 0
    """Records of metrics.jsonl that MLflow has."""
    told: float = 0.0
    """The time stamp of the state up to which MLflow has everything; 0 while the run goes on."""

    @classmethod
    def of(cls, rundir: RunDir, uri: str | None = None) -> MlflowRun:
        """The run of a folder in the store at ``uri``, by default its own (see ``home``)."""
        config = manifest.read_config(rundir)
        tracking = bind(config["tracking"], "tracking")()
        return cls(rundir, uri or home(rundir, tracking, config["outputs_dir"]), tracking, config)

    def update(self) -> None:
        """Bring MLflow up to what the folder says now; what is there already is not sent again."""
        state, client = self.rundir.read_state(), store.connect(self.uri)
        run = self.run = self.run or self._open(client, state, self.rundir.read_manifest())
        manifest, ended = self.rundir.read_manifest(), state.status in ENDED
        if not ended:
            self._send_status(client, run, state)
        upload.send_tags(client, run, tags(self.rundir, manifest, state))
        upload.send_dataset(client, run, manifest.get("data") or {})
        for path in (self.rundir.metrics, self.rundir.system):
            self._send_records(client, run, path)
        self._send_evaluations(client, run)
        try:
            if ended and run.data.tags.get(TOLD_TAG) != str(state.updated):
                self._send_results(client, run)
                upload.send_tags(client, run, {TOLD_TAG: str(state.updated)})
        finally:  # a model that cannot be stored leaves no run RUNNING for ever
            self._send_status(client, run, state)
        self.told = state.updated if ended else 0.0

    def try_update(self) -> str:
        """``update``, with what went wrong as a text; empty when nothing did."""
        try:
            self.update()
        except Exception as error:  # a store fails in a hundred ways; none of them may end the mirror
            self.run, self.positions = None, {}  # look anew at what is there
            return explained(error, self.uri)
        return ""

    def report(self, problem: str) -> int:
        """Write down how far MLflow is behind the folder; returns the number of records it lacks."""
        unsent = max(0, len(read(self.rundir)) - self.sent)
        if self.rundir.path.exists():
            said = {"sent": self.sent, "unsent": unsent, "problem": problem, "told": self.told}
            write_atomic(self.rundir.mirror_report, json.dumps(said))
        return unsent

    def _open(self, client: MlflowClient, state: State, manifest: dict[str, Any]) -> Run:
        """Find the run or make it, and send what holds from its beginning to its end."""
        artifacts = artifacts_dir(self.uri, self.config["outputs_dir"])
        experiment = store.experiment_id(client, self.tracking.experiment, artifacts)
        identity = str(manifest.get("id") or self.rundir.path)
        run = store.find_run(client, experiment, identity, (manifest.get("mlflow") or {}).get("run_id"))
        if run is None:
            name = self.tracking.run_name or str(manifest.get("name") or self.rundir.path.name)
            began = state.started or (state.updated if state.status in ENDED else time.time())
            run = store.create_run(client, experiment, identity, name, began)
        note(self.rundir, self.uri, run)
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
        offset = offset if inode == before else 0  # another inode: cut back by a resume, read it all again
        records, end = tail(path, offset)
        upload.send_metrics(client, run, records, self.known)
        self.positions[path] = inode, end
        if path == self.rundir.metrics:
            self.sent = (self.sent if offset else 0) + len(records)

    def _send_evaluations(self, client: MlflowClient, run: Run) -> None:
        """What was measured after training; the same step may have been measured twice, told apart by their times."""
        path = self.rundir.evaluations
        if not path.exists() or self.positions.get(path) == (path.stat().st_ino, path.stat().st_size):
            return
        position = path.stat().st_ino, path.stat().st_size
        upload.send_evaluations(client, run, read_evaluations(self.rundir))
        client.log_artifact(run.info.run_id, str(path))
        self.positions[path] = position

    def _send_status(self, client: MlflowClient, run: Run, state: State) -> None:
        if self.status == STATUS[state.status]:
            return
        # Nobody saw it die: it was at work until its last record, not until somebody looked.
        unseen = state.reason == DIED and self.rundir.metrics.exists()
        ended_at = self.rundir.metrics.stat().st_mtime if unseen else state.updated
        upload.set_status(client, run, STATUS[state.status], ended_at if state.status in ENDED else None)
        self.status = STATUS[state.status]

    def _send_results(self, client: MlflowClient, run: Run) -> None:
        """What there is to show at the end: log, manifest, samples as a table, and the model if it is asked for."""
        for path in (self.rundir.manifest, self.rundir.log):
            if path.exists():
                client.log_artifact(run.info.run_id, str(path))
        if self.rundir.samples.exists():
            upload.send_table(client, run, json.loads(self.rundir.samples.read_text()), self.rundir.samples.name)
        self._send_outcome(client, run)
        wanted, is_adapter = self.tracking.log_model, (self.rundir.model / "adapter_config.json").exists()
        if self.rundir.model.is_dir() and (wanted is True or (wanted == "adapter" and is_adapter)):
            client.log_artifacts(run.info.run_id, str(self.rundir.model), self.rundir.model.name)
            model = self.rundir.read_manifest().get("model") or {}
            params = {"base": str(model.get("path")), "revision": str(model.get("revision"))}
            kind, step = "adapter" if is_adapter else "model", self.rundir.read_state().step
            upload.send_model(client, run, str(model.get("name") or "model"), kind, params, step)

    def _send_outcome(self, client: MlflowClient, run: Run) -> None:
        """What no record says and comparing asks for: the best loss and the seconds of training, at the last step."""
        from mlflow.entities import Metric

        state = self.rundir.read_state()
        known = {BEST: last_values(read(self.rundir)).get(BEST), SECONDS: state.seconds or None}
        now_ms = int(state.updated * 1000)
        points = [Metric(name, value, now_ms, state.step) for name, value in known.items() if value is not None]
        if points:
            client.log_batch(run.info.run_id, metrics=points)


def home(rundir: RunDir, tracking: Tracking, outputs_dir: str | Path) -> str:
    """The store of a run: the one that its configuration names; of ``tracking=offline`` the one it was brought into."""
    if tracking.kind == "offline":
        with contextlib.suppress(OSError, ValueError):  # a damaged manifest is said where it is needed
            noted = str((rundir.read_manifest().get("mlflow") or {}).get("uri") or "")
            if noted and store.is_there(noted):
                return noted
    return store_uri(tracking, outputs_dir)


def artifacts_dir(uri: str, outputs_dir: str | Path) -> Path | None:
    """Where the artifacts of a store lie; None where its server decides."""
    return None if store.is_server(uri) else Path(outputs_dir, "mlartifacts")


def note(rundir: RunDir, uri: str, run: Run, **more: Any) -> None:
    """Write into the manifest which run of MLflow this folder is; a parent in another store is forgotten."""
    noted = rundir.read_manifest().get("mlflow") or {}
    here = where(uri, run)
    kept = noted if noted.get("uri", here["uri"]) == here["uri"] else {}
    if {**kept, **here, **more} != noted:
        rundir.update_manifest(mlflow={**kept, **here, **more})


def where(uri: str, run: Run) -> dict[str, Any]:
    """What is noted of a run: {run_id, experiment_id, uri, url}."""
    uri, _, _ = take_credentials(uri)
    run_id, experiment = run.info.run_id, run.info.experiment_id
    url = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}" if store.is_server(uri) else None
    return {"run_id": run_id, "experiment_id": experiment, "uri": uri, "url": url}


def tags(rundir: RunDir, manifest: dict[str, Any], state: State) -> dict[str, Any]:
    """The tags of a run; MLflow's own are set by us, as it would describe the process that mirrors."""
    git, command = manifest.get("git") or {}, manifest.get("command") or []
    return {
        "runner.signature": manifest.get("signature"),
        "runner.sweep": manifest.get("sweep"),
        "runner.status": state.status,
        "runner.reason": state.reason,
        "runner.attempt": state.attempt,
        "runner.folder": str(rundir.path),
        "runner.host": state.host,
        "runner.slurm_job_id": state.scheduler_id,
        "runner.git_sha": git.get("sha"),
        "runner.git_dirty": git.get("dirty"),
        "runner.rerun_of": (manifest.get("rerun") or {}).get("of"),
        "mlflow.parentRunId": (manifest.get("mlflow") or {}).get("parent_run_id"),
        "mlflow.source.name": command if isinstance(command, str) else shlex.join(command),
        "mlflow.source.type": "JOB" if state.scheduler_id else "LOCAL",
        "mlflow.source.git.commit": git.get("sha"),
        "mlflow.user": user(),
    }


def explained(error: Exception, uri: str) -> str:
    """What went wrong in a line, without secrets."""
    store_name = "the embedded database" if not store.is_server(uri) else "the server"
    text = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}".splitlines()[0]
    return redact(f"MLflow ({store_name}, {take_credentials(uri)[0]}): {text[:600]}")
