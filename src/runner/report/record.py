"""Read everything recorded about a run: from its folder, or from MLflow if the folder is on another machine."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from runner import terminal
from runner.config import code_files, moved, user_code
from runner.errors import ConfigError, Fault, RunnerError
from runner.files import cache_dir, locked, user_path
from runner.report import store_lookup
from runner.tracking import lookup, metrics_log, provenance, run_status
from runner.tracking.checkout import Code
from runner.tracking.manifest import is_of_first, read_config
from runner.tracking.mlflow import store
from runner.tracking.rundir import RunDir

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Curves = dict[str, dict[int, float]]
"""Metric name → step → value."""

STATUS = {"FINISHED": "completed", "KILLED": "killed", "FAILED": "failed", "RUNNING": "running", "SCHEDULED": "queued"}


@dataclass(frozen=True)
class Recorded:
    """Everything recorded about one run."""

    name: str
    where: str
    """For messages: the run folder, or ``ID in URI``."""
    config: dict[str, Any]
    manifest: dict[str, Any]
    status: str = ""
    curves: Curves = field(default_factory=dict)
    patch: str = ""
    """The uncommitted changes of the code when the run started."""
    folder: Path | None = None
    """None if the run was read from MLflow."""
    lost: str = ""
    """The records that are missing in metrics.jsonl, as text; empty if it is complete."""
    is_of_first: bool = False
    """Whether version 0.1.0 wrote its configuration, with that version's names of options."""

    @property
    def mlflow_id(self) -> str:
        return str((self.manifest.get("mlflow") or {}).get("run_id") or "")

    @property
    def code(self) -> Code | None:
        """Commit and uncommitted changes; None for a run started outside a git repository."""
        sha = (self.manifest.get("git") or {}).get("sha")
        return Code(str(sha), self.patch) if sha else None

    @property
    def last_step(self) -> int:
        return max((step for curve in self.curves.values() for step in curve), default=0)


def find(word: str, outputs_dir: Path, uri: str | None = None) -> Recorded:
    """The run named by ``word``: a folder, a name, or the beginning of an MLflow run id.

    ``uri``: search this MLflow store first. Without it, search the folders, then the database ``outputs/mlflow.db``.

    Raises:
        ConfigError: there is no such run, there are several, or its records are incomplete.
        TrackingError: the store cannot be read.
    """
    path = user_path(word)
    if is_folder := os.path.isdir(path):
        _refuse_runless(path, word)
    if uri is None or is_folder:
        return _local(word, outputs_dir)
    try:
        return of_store(word, uri)
    except store_lookup.UnknownRunError:
        with contextlib.suppress(ConfigError):
            return of_folder(lookup.resolve_run(word, outputs_dir))
        raise


def refuse_unbegun(run: Recorded, problem: str) -> None:
    """Refuse a run that has not started training: only its configuration is recorded."""
    if run.status == "pending" and not run.curves:
        near = terminal.nearest(run.folder) if run.folder else ""
        if run.folder and (now := run_status.of([RunDir(run.folder)])[0].status) in run_status.LIVE:
            remedy = f"wait until the run has finished; its progress: python -m runner status {terminal.typed(near)}"
            raise ConfigError(Fault("", f"{run.where} is {now}: {problem}", remedy))
        command = f"python -m runner {terminal.typed(near, 'resume')}"
        remedy = f"start it: {command}" if near else "start it on the machine with its folder"
        raise ConfigError(Fault("", f"{run.where} has not started: {problem}", remedy))


def of_folder(rundir: RunDir) -> Recorded:
    """Read a run folder.

    Raises:
        ConfigError: files of the run are missing or damaged.
    """
    where = terminal.nearest(rundir.path)
    try:
        if not (manifest := rundir.read_manifest()):
            problem = f"{where} has no manifest.json: the preparation of the run was interrupted"
            raise ConfigError(Fault("", problem, "run the command of the run again, or restore the file"))
        state = rundir.read_state()
        config = read_config(rundir)
        patch = _text_of(rundir.dirty_diff) if rundir.dirty_diff.exists() else ""
        records = metrics_log.read(rundir)
        curves, lost = _curves(records), metrics_log.lost_of(state, records, config)
        if "weights_sha256" not in manifest and rundir.model.is_dir():
            manifest["weights_sha256"] = provenance.weights_digest(rundir.model)
    except RunnerError as error:
        raise ConfigError(*error.faults) from error
    except lookup.DAMAGED as error:
        problem = f"the files of {where} are damaged ({type(error).__name__}: {error})"
        raise ConfigError(Fault("", problem, "restore the damaged file, or name another run")) from error
    name = str(manifest.get("name") or rundir.path.name)
    return Recorded(name, where, config, manifest, state.status, curves, patch, rundir.path, lost, is_of_first(rundir))


def of_store(word: str, uri: str) -> Recorded:
    """Read a run from an MLflow store, or from its folder if that is on this machine.

    ``word`` is the name of the run or the beginning of its id.

    Raises:
        UnknownRunError: the store has no such run.
        ConfigError: the store has several such runs, or config.yaml or manifest.json of the run is missing.
        TrackingError: the store cannot be read.
    """
    uri = store_lookup.checked(uri)
    with store_lookup.tracking_errors(uri):
        run_id = store_lookup.run_id_of(word, uri)
        if uri.startswith("sqlite:") and (rundir := _local_folder(store_lookup.tags_of_database(run_id, uri))):
            return of_folder(rundir)
        client = store.connect(uri)
        run = client.get_run(run_id)
        if rundir := _local_folder(run.data.tags):
            return of_folder(rundir)
        if "runner.signature" not in run.data.tags:
            problem = f"{run.info.run_id[:8]} in {uri} is not a training run of runner"
            raise ConfigError(Fault("", problem, "name a training run, not the parent run of a sweep"))
        curves = _histories(client, run)
        files = dict(_artifacts(client, run, ("config.yaml", "manifest.json", "dirty.diff")))
        code = _code(client, run, files.get("config.yaml", ""))
    if missing := [name for name in ("config.yaml", "manifest.json") if name not in files]:
        problem = f"{uri} has no {' and no '.join(missing)} of the run {run.info.run_id[:8]}"
        remedy = "upload them with python -m runner sync on the machine with the run folder, or name that folder"
        raise ConfigError(Fault("", problem, remedy))
    manifest = json.loads(files["manifest.json"])
    manifest["mlflow"] = {**(manifest.get("mlflow") or {}), "run_id": run.info.run_id}
    status = run.data.tags.get("runner.status") or STATUS.get(run.info.status, "")
    name = str(manifest.get("name") or run.info.run_name)
    where = f"{run.info.run_id[:8]} in {uri}"
    config = yaml.safe_load(files["config.yaml"])
    first = moved.is_of_first(config)
    config = moved.to_today(config)
    user_code.refuse_given(config)
    if code:
        user_code.attach_copy(config, code)
    return Recorded(name, where, config, manifest, status, curves, files.get("dirty.diff", ""), is_of_first=first)


def _refuse_runless(folder: Path, word: str) -> None:
    if any((folder / file).exists() for file in ("state.json", "manifest.json", "sweep.json")):
        return
    paths = [terminal.nearest(run_or_sweep.path) for run_or_sweep in lookup.scan(folder)]
    lines = [*paths[: store_lookup.SHOWN], *(["…"] if len(paths) > store_lookup.SHOWN else [])]
    remedy = "name one of these:" + "".join(f"\n      {line}" for line in lines) if paths else "name a run folder"
    raise ConfigError(Fault("", f"{word} is not a run folder: it has no manifest.json", remedy))


def _local(word: str, outputs_dir: Path) -> Recorded:
    """The run in a folder below ``outputs_dir``; if its folder was deleted, the run in ``outputs_dir/mlflow.db``."""
    try:
        rundir = lookup.resolve_run(word, outputs_dir)
    except ConfigError:
        database = outputs_dir.absolute() / "mlflow.db"
        if database.exists() and store_lookup.may_be_id(word):
            with contextlib.suppress(store_lookup.UnknownRunError):
                return of_store(word, f"sqlite:///{database}")
        raise
    return of_folder(rundir)


def _local_folder(tags: Mapping[str, str]) -> RunDir | None:
    """The folder of a run in MLflow; None if it is not on this machine."""
    folder = tags.get("runner.folder")
    rundir = RunDir(Path(folder)) if folder else None
    is_same = rundir and rundir.manifest.exists() and rundir.read_manifest().get("id") == tags.get(store.ID_TAG)
    return rundir if is_same else None


def _histories(client: MlflowClient, run: Run) -> Curves:
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    return {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in names}


def _artifacts(client: MlflowClient, run: Run, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, content) of those of the files ``names`` that MLflow has."""
    available = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:
        for name in names:
            if name in available:
                yield name, _text_of(Path(client.download_artifacts(run.info.run_id, name, folder)))


def _code(client: MlflowClient, run: Run, config: str) -> Path | None:
    """A copy of the user's own code that the run has in MLflow, in the cache; None if it has none."""
    if not isinstance((yaml.safe_load(config) or {}).get(code_files.KEY), dict):
        return None
    folder = cache_dir("code") / run.info.run_id
    with locked(folder.with_suffix(".lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                Path(client.download_artifacts(run.info.run_id, code_files.FOLDER, aside)).rename(folder)
    return folder


def _curves(records: list[metrics_log.Record]) -> Curves:
    curves: Curves = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                curves.setdefault(name, {})[record["step"]] = float(value)
    return curves


def _text_of(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "surrogateescape")
