"""Upload one run folder to its MLflow run.

``MlflowRun.update`` is idempotent: it compares the folder with MLflow and sends what is missing. So if an upload
process is killed, the next one continues.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.bind import bind
from runner.files import write_atomic
from runner.tracking import manifest
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
from runner.tracking.mlflow.outbox import Outbox
from runner.tracking.mlflow.place import Seen, artifacts_dir, home, note, noted, parent_of
from runner.tracking.naming import short_name
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DIED, FINAL, State
from runner.tracking.trackers import Tracking

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


@dataclass(eq=False)
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
    state: State = field(default_factory=State)
    """The state at the last ``send_rows``."""
    outbox: Outbox = field(default_factory=Outbox)
    parent: dict[str, str] | None = None
    """{parent_run_id}, or empty, while the id of the run is not in the manifest yet; else None."""
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
        self.send_rows()
        try:
            self.send_files()
        except BaseException:
            self.send_end(is_complete=False)
            raise
        self.send_end()

    def send_rows(self, seen: Seen | None = None) -> None:
        """Create the run if it is missing, and send params, tags and metrics; collect the files that are missing."""
        state, client = self.rundir.read_state(), store.connect(self.uri)
        run = self.run = self.run or self._open(client, state, self.rundir.read_manifest(), seen or Seen())
        self.state, manifest = state, self.rundir.read_manifest()
        if self.parent is not None:
            manifest["mlflow"] = noted(manifest.get("mlflow") or {}, self.uri, run, **self.parent)
        if state.status not in ENDED:
            self._send_status(client, run, state)
        upload.send_tags(client, run, tags.of_run(self.rundir, manifest, state))
        upload.send_dataset(client, run, manifest.get("data") or {})
        for path in (self.rundir.metrics, self.rundir.system):
            self._send_records(client, run, path)
        self._send_evaluations(client, run)
        self._send_answers(client, run)
        if self._lacks_results():
            self._send_results(client, run, state)

    def send_files(self) -> None:
        """After ``send_rows``: note the id of the run in its folder, and send its files; the database is not used."""
        assert self.run is not None
        if self.parent is not None:
            note(self.rundir, self.uri, self.run, **self.parent)
            self.parent = None
        self.outbox.send(store.connect(self.uri), self.run)

    def send_end(self, *, is_complete: bool = True) -> None:
        """After ``send_files``: the model, the mark that the run is complete if it is, and the status."""
        run, state, client = self.run, self.state, store.connect(self.uri)
        assert run is not None
        try:
            if is_complete and self._lacks_results():
                if kind := self._model_kind():
                    self._send_model(client, run, kind)
                upload.send_tags(client, run, {UPLOADED_TAG: str(state.updated)})
        finally:  # even if the upload of the model fails, the run does not stay RUNNING
            self._send_status(client, run, state)
        self.uploaded = state.updated if state.status in ENDED and is_complete else 0.0

    def forget(self) -> None:
        """Compare everything with MLflow again at the next update."""
        self.run, self.parent, self.positions, self.outbox = None, None, {}, Outbox()

    def size(self) -> int:
        """Bytes of the records of the run."""
        files = (self.rundir.metrics, self.rundir.system, self.rundir.evaluations)
        return sum(path.stat().st_size for path in files if path.exists())

    def try_update(self, *, closes_doubles: bool = False) -> str:
        """Like ``update``, but returns the error message; empty on success. ``closes_doubles``: see there."""
        try:
            self.update()
            if closes_doubles:
                self.close_doubles()
        except Exception as error:  # MLflow stores raise many exception types; none may end the upload process
            self.forget()
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
            write_atomic(self.rundir.mirror_report, json.dumps(report), is_durable=False)
        return unsent

    def _open(self, client: MlflowClient, state: State, manifest: dict[str, Any], seen: Seen) -> Run:
        """Find or create the run, and send what does not change: params, config, manifest, environment."""
        name = self.tracking.experiment
        if name not in seen.experiments:
            artifacts = artifacts_dir(self.uri, self.config["outputs_dir"])
            seen.experiments[name] = store.experiment_id(client, name, artifacts)
        experiment, identity = seen.experiments[name], str(manifest.get("id") or self.rundir.path)
        run, self.known = None, defaultdict(set)
        if identity not in seen.unknown:
            run = store.find_run(client, experiment, identity, (manifest.get("mlflow") or {}).get("run_id"))
            self.known = upload.known_steps(client, run) if run else self.known
        if run is None:
            run = self._create(client, experiment, state, manifest)
            seen.unknown.discard(identity)  # a copy of the folder is the same run
        self.parent, self.status = parent_of(self.rundir, self.uri), run.info.status
        upload.send_params(client, run, self.config, manifest.get("choices"))
        self.outbox.add(self.rundir.config, self.rundir.manifest, self.rundir.dirty_diff, self.rundir.code)
        environment = {"versions": manifest.get("versions") or {}, "packages": self.packages}
        self.outbox.texts["environment.json"] = json.dumps(environment, indent=1)
        return run

    def _create(self, client: MlflowClient, experiment: str, state: State, manifest: dict[str, Any]) -> Run:
        identity = str(manifest.get("id") or self.rundir.path)
        name = self.tracking.run_name or short_name(manifest) or self.rundir.path.name
        started = state.started or (state.updated if state.status in ENDED else time.time())
        initial = {**tags.of_user(self.tracking), **tags.of_run(self.rundir, manifest, state)}
        initial[tags.PARENT_TAG] = parent_of(self.rundir, self.uri).get("parent_run_id")
        return store.create_run(client, experiment, identity, name, started, initial)

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
        self.outbox.add(path)
        self.positions[path] = position

    def _send_answers(self, client: MlflowClient, run: Run) -> None:
        """The answers of each evaluation as tables; those that a resumed run writes again are sent again."""
        for folder in (self.rundir.answers, self.rundir.rollouts):
            for path in sorted(folder.glob("step-*.json")):
                position = (path.stat().st_ino, path.stat().st_size)
                if self.positions.get(path) != position:
                    self._send_table(client, run, path, f"{folder.name}/{path.name}")
                    self.positions[path] = position

    def _send_status(self, client: MlflowClient, run: Run, state: State) -> None:
        if self.status == STATUS[state.status]:
            return
        # A killed worker wrote no end time: use the time of its last record, not the time of the status query.
        was_killed = state.reason == DIED and self.rundir.metrics.exists()
        ended_at = self.rundir.metrics.stat().st_mtime if was_killed else state.updated
        upload.set_status(client, run, STATUS[state.status], ended_at if state.status in ENDED else None)
        self.status = STATUS[state.status]

    def _lacks_results(self) -> bool:
        """Whether the run has ended, and MLflow does not have all of it."""
        is_marked = self.run is not None and self.run.data.tags.get(UPLOADED_TAG) == str(self.state.updated)
        return self.state.status in ENDED and not is_marked

    def _send_results(self, client: MlflowClient, run: Run, state: State) -> None:
        """The results of a finished run: summary, samples as a table, log, manifest and model (``log_model``)."""
        self.outbox.add(self.rundir.manifest, self.rundir.log, self.rundir.profile)
        with contextlib.suppress(OSError, ValueError):  # lost or damaged: the worker reports it
            self._send_table(client, run, self.rundir.samples, self.rundir.samples.name)
        self._send_summary(client, run, state)
        self.close_doubles()
        if self._model_kind():
            self.outbox.add(self.rundir.model)

    def _send_table(self, client: MlflowClient, run: Run, path: Path, name: str) -> None:
        self.outbox.texts[name] = upload.table(json.loads(path.read_text()))
        upload.send_table_tag(client, run, name)

    def _model_kind(self) -> str:
        """adapter or model, if it is uploaded; empty if not."""
        log_model, is_adapter = self.tracking.log_model, (self.rundir.model / "adapter_config.json").exists()
        is_wanted = self.rundir.model.is_dir() and (log_model is True or (log_model == "adapter" and is_adapter))
        return ("adapter" if is_adapter else "model") if is_wanted else ""

    def _send_model(self, client: MlflowClient, run: Run, kind: str) -> None:
        model = self.rundir.read_manifest().get("model") or {}
        params = {"base": str(model.get("path")), "revision": str(model.get("revision"))}
        upload.send_model(client, run, str(model.get("name") or "model"), kind, params, self.state.model_step)

    def close_doubles(self) -> None:
        """Close runs and models that a repeated request created besides those of this run."""
        client, identity = store.connect(self.uri), self.rundir.read_manifest().get("id")
        if self.run and identity and store.is_server(self.uri):
            store.close_doubles(client, self.run, str(identity))
            if hasattr(client, "search_logged_models"):  # added in MLflow 3
                upload.delete_double_models(client, self.run)

    def _send_summary(self, client: MlflowClient, run: Run, state: State) -> None:
        """Send the metrics that no record contains and ``compare`` uses: best eval loss and training seconds."""
        from mlflow.entities import Metric

        records = read(self.rundir)
        best = last_values(records).get(BEST) if not lost_of(state, records, self.config) else None
        summary = {BEST: best, SECONDS: state.seconds or None}
        now_ms = int(state.updated * 1000)
        points = [Metric(name, value, now_ms, state.step) for name, value in summary.items() if value is not None]
        if points:
            client.log_batch(run.info.run_id, metrics=points)
