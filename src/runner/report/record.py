"""Read everything recorded about a run: from its folder, or from MLflow if the folder is on another machine."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from runner import terminal
from runner.config import code_files, moved, user_code
from runner.errors import ConfigError, Fault, RunnerError, TrackingError, suggest
from runner.files import cache_dir, locked
from runner.secrets import redact
from runner.tracking import lookup, metrics_log, provenance, run_status, trackers
from runner.tracking.checkout import Code
from runner.tracking.manifest import is_of_first, keep_credentials, read_config
from runner.tracking.mlflow import store
from runner.tracking.mlflow.run import explained
from runner.tracking.rundir import RunDir

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Curves = dict[str, dict[int, float]]
"""Metric name → step → value."""

STATUS = {"FINISHED": "completed", "KILLED": "killed", "FAILED": "failed", "RUNNING": "running", "SCHEDULED": "queued"}
SHOWN, LATEST = 8, 200


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
    """What its metrics.jsonl has lost; empty if it is complete."""
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
    path = Path(word).expanduser()
    if path.is_dir():
        _refuse_runless(path, word)
    if uri is None or path.is_dir():
        return _local(word, outputs_dir)
    try:
        return of_store(word, uri)
    except UnknownRunError:
        with contextlib.suppress(ConfigError):
            return of_folder(lookup.resolve_run(word, outputs_dir))
        raise


class UnknownRunError(ConfigError):
    """The store has no such run."""


def refuse_unbegun(run: Recorded, problem: str) -> None:
    """Refuse a run that has not started training: only its configuration is recorded.

    Raises:
        ConfigError: the run has not started.
    """
    if run.status == "pending" and not run.curves:
        folder = terminal.nearest(run.folder) if run.folder else ""
        if run.folder and (now := run_status.of([RunDir(run.folder)])[0].status) in run_status.LIVE:
            remedy = f"wait until the run has finished; its progress: python -m runner status {folder}"
            raise ConfigError(Fault("", f"{run.where} is {now}: {problem}", remedy))
        remedy = f"start it: python -m runner resume={folder}" if folder else "start it on the machine with its folder"
        raise ConfigError(Fault("", f"{run.where} has not started: {problem}", remedy))


def of_folder(rundir: RunDir) -> Recorded:
    """Read a run folder.

    Raises:
        ConfigError: files of the run are missing or damaged.
    """
    if not rundir.manifest.exists():
        problem = f"{terminal.nearest(rundir.path)} has no manifest.json: the preparation of the run was interrupted"
        raise ConfigError(Fault("", problem, "run the command of the run again, or restore the file"))
    try:
        manifest, state = rundir.read_manifest(), rundir.read_state()
        config = read_config(rundir)
        patch = _text_of(rundir.dirty_diff) if rundir.dirty_diff.exists() else ""
        records = metrics_log.read(rundir)
        curves, lost = _curves(records), metrics_log.lost_of(state, records, config)
    except RunnerError as error:
        raise ConfigError(*error.faults) from error
    except lookup.DAMAGED as error:
        problem = f"the files of {terminal.nearest(rundir.path)} are damaged ({type(error).__name__}: {error})"
        raise ConfigError(Fault("", problem, "restore manifest.json and state.json, or name another run")) from error
    if "weights_sha256" not in manifest and rundir.model.is_dir():
        manifest["weights_sha256"] = provenance.weights_digest(rundir.model)
    name = str(manifest.get("name") or rundir.path.name)
    where = terminal.nearest(rundir.path)
    return Recorded(name, where, config, manifest, state.status, curves, patch, rundir.path, lost, is_of_first(rundir))


def of_store(word: str, uri: str) -> Recorded:
    """Read a run from an MLflow store, or from its folder if that is on this machine.

    ``word`` is the name of the run or the beginning of its id.

    Raises:
        UnknownRunError: the store has no such run.
        ConfigError: the store has several such runs, or config.yaml or manifest.json of the run is missing.
        TrackingError: the store cannot be read.
    """
    uri = checked(uri)
    with tracking_errors(uri):
        is_database = uri.startswith("sqlite:")
        run_id = _only(*(_heads_of_database(word, uri) if is_database else _heads(word, uri)), word, uri).run_id
        if is_database and (rundir := _local_folder(_tags_of_database(run_id, uri))):
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


def checked(uri: str) -> str:
    """Check the URI of a store, and move its credentials into MLflow's environment variables; returns the rest.

    Raises:
        ConfigError: the URI is invalid.
        TrackingError: the database file does not exist.
    """
    if faults := list(trackers.check_mlflow(uri=uri, experiment="runner", run_name=None)):
        raise ConfigError(*faults)
    node = {"tracking": {"uri": uri}}
    keep_credentials(node)
    uri = str(node["tracking"]["uri"])
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise TrackingError(Fault("uri", "there is no such database", "the default is outputs/mlflow.db", uri))
    return uri


@contextlib.contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Turn every exception of MLflow, SQL or HTTP in the block into a TrackingError."""
    try:
        yield
    except RunnerError:
        raise
    except Exception as error:
        is_server = store.is_server(uri)
        remedy = "check the address, and that the server is running" if is_server else "is this an MLflow database?"
        raise TrackingError(Fault("uri", explained(error, uri), remedy)) from error


def _refuse_runless(folder: Path, word: str) -> None:
    if any((folder / file).exists() for file in ("state.json", "manifest.json", "sweep.json")):
        return
    paths = [terminal.nearest(run_or_sweep.path) for run_or_sweep in lookup.scan(folder)]
    lines = [*paths[:SHOWN], *(["…"] if len(paths) > SHOWN else [])]
    remedy = "name one of these:" + "".join(f"\n      {line}" for line in lines) if paths else "name a run folder"
    raise ConfigError(Fault("", f"{word} is not a run folder: it has no manifest.json", remedy))


def _local(word: str, outputs_dir: Path) -> Recorded:
    """The run in a folder below ``outputs_dir``; if its folder was deleted, the run in ``outputs_dir/mlflow.db``."""
    try:
        rundir = lookup.resolve_run(word, outputs_dir)
    except ConfigError:
        database = outputs_dir.absolute() / "mlflow.db"
        if database.exists() and _may_be_id(word):
            with contextlib.suppress(UnknownRunError):
                return of_store(word, f"sqlite:///{database}")
        raise
    return of_folder(rundir)


def _may_be_id(word: str) -> bool:
    return len(word) >= lookup.SHORTEST_ID and set(word) <= set("0123456789abcdef")


@dataclass(frozen=True)
class _Head:
    """A run in a list of runs."""

    run_id: str
    name: str
    status: str


def _only(matches: list[_Head], latest: list[_Head], word: str, uri: str) -> _Head:
    """The only match; raises ConfigError for several, UnknownRunError for none."""
    if len(matches) == 1:
        return matches[0]
    if matches:
        remedy = f"use more characters of the run id:{_listed(matches)}"
        raise ConfigError(Fault("", f"'{word}' is ambiguous: it matches {len(matches)} or more runs in {uri}", remedy))
    remedy = suggest(word, [name for head in latest for name in (head.name, head.run_id)])
    if not remedy:
        remedy = f"its latest runs:{_listed(latest)}" if latest else "the store has no runs: name another with uri=…"
    raise UnknownRunError(Fault("", f"there is no run '{word}' in {uri}", remedy))


def _listed(heads: Sequence[_Head]) -> str:
    names = terminal.told_apart([head.name for head in heads[:SHOWN]], lookup.WIDEST)
    lines = (f"{head.run_id}  {name}  {head.status}" for head, name in zip(heads, names, strict=False))
    return redact("".join(f"\n      {line}" for line in lines))


def _heads_of_database(word: str, uri: str) -> tuple[list[_Head], list[_Head]]:
    """(runs that match ``word``, the latest runs), read with SQL because importing MLflow takes seconds."""
    (rows,) = store.read_sqlite(
        Path(uri.removeprefix("sqlite:///")),
        [
            "SELECT run_uuid, COALESCE(runs.name, ''), status FROM runs JOIN experiments USING (experiment_id) "
            "WHERE runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active' ORDER BY start_time DESC"
        ],
    )
    heads = [_Head(*row) for row in rows]
    matches = [head for head in heads if _may_be_id(word) and head.run_id.startswith(word)]
    return matches or [head for head in heads if head.name == word], heads[:LATEST]


def _tags_of_database(run_id: str, uri: str) -> dict[str, str]:
    database = Path(uri.removeprefix("sqlite:///"))
    (rows,) = store.read_sqlite(database, ["SELECT key, value FROM tags WHERE run_uuid = ?"], [run_id])
    return dict(rows)


def _heads(word: str, uri: str) -> tuple[list[_Head], list[_Head]]:
    """(runs that match ``word``, the latest runs), read with MLflow's client."""
    client = store.connect(uri)
    experiments = [str(each.experiment_id) for each in client.search_experiments()]

    def search(query: str, count: int) -> list[_Head]:
        runs = client.search_runs(experiments, query, max_results=count)
        return [_Head(run.info.run_id, run.info.run_name or "", run.info.status) for run in runs]

    matches = search(f"attributes.run_id LIKE '{word}%'", SHOWN + 1) if _may_be_id(word) else []
    if not matches and not {"'", '"'} <= set(word):
        quote = '"' if "'" in word else "'"
        matches = search(f"attributes.run_name = {quote}{word}{quote}", SHOWN + 1)
    return matches, [] if matches or not experiments else search("", LATEST)


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
