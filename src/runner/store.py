"""One run in an MLflow store: find or make it, then bring it up to what it should say.

Every function may be called again, by this process or by the next: what MLflow has already is not sent twice.
Limits of MLflow (3.17): 100 params, 100 tags or 1000 metrics a batch; 6000 characters a param, 8000 a tag.
"""

from __future__ import annotations

import functools
import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runner.errors import Fault, TrackingError
from runner.files import locked
from runner.secrets import put_credentials, redact_tree

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

Known = dict[str, set[int]]
"""Metric name → the steps that MLflow has."""

PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000
LONGEST_PARAM, LONGEST_TAG, LONGEST_NAME, LONGEST_DIGEST = 6000, 8000, 250, 36
ID_TAG, MODEL_TAG = "runner.id", "runner.model_id"

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow retries for four minutes by default; whoever calls this module tries again by himself.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""How MLflow behaves here, unless the user's environment says otherwise."""

T = TypeVar("T")


@functools.cache
def connect(uri: str) -> MlflowClient:
    """A client of the store; makes a sqlite database where there is none (3 s on two cores)."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    if not uri.startswith("sqlite:"):
        mlflow.set_tracking_uri(uri := with_credentials(uri))
        return mlflow.MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    # Processes that start together on a fresh file ruin it: one at a time may open it, which is what a client does.
    with locked(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            _make(database)
        mlflow.set_tracking_uri(uri)  # artifacts of an older MLflow ask for this one, not for the client's
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _make(database: Path) -> None:
    """Make a sqlite database aside: who is killed meanwhile leaves half of one, and no MLflow opens that again."""
    import mlflow

    aside = database.with_name(f".{database.name}.new")
    for left in (aside, aside.with_name(f"{aside.name}-journal")):
        left.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)
    aside.rename(database)


def answers(uri: str) -> bool:
    """Whether the store can be asked anything at all."""
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception:  # refused, timed out, locked, out of date: it does not answer
        return False
    return True


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def experiment_id(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """The id of the experiment, made if need be with its artifacts under ``artifacts`` (None: the server decides).

    Raises:
        TrackingError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts.absolute().as_uri() if artifacts else None))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # someone else was faster
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        remedy = f"restore it (mlflow experiments restore), or set tracking.experiment to another than {name}"
        raise TrackingError(Fault("tracking.experiment", "was deleted in MLflow", remedy, name))
    return str(found.experiment_id)


def find_run(client: MlflowClient, experiment: str, identity: str, noted: str | None) -> Run | None:
    """The run noted earlier, or the one that bears the tag ``runner.id``; None where MLflow has neither.

    The tag is there from the moment a run is made: a crash before its id was noted makes no second run.

    Raises:
        TrackingError: it was deleted.
    """
    run = find_any_run(client, experiment, identity, noted)
    if run is not None and run.info.lifecycle_stage != "active":
        remedy = f"restore it: mlflow runs restore --run-id {run.info.run_id}"
        raise TrackingError(Fault("", f"the MLflow run {run.info.run_id} was deleted", remedy))
    return run


def find_any_run(client: MlflowClient, experiment: str, identity: str, noted: str | None) -> Run | None:
    """``find_run`` that also returns a run which was deleted and can be restored."""
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    run = None
    if noted:
        try:
            run = client.get_run(noted)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    if run is None or run.data.tags.get(ID_TAG) != identity:
        wanted = f"tags.`{ID_TAG}` = '{identity}'"
        runs = client.search_runs([experiment], wanted, run_view_type=ViewType.ALL, max_results=1)
        run = client.get_run(runs[0].info.run_id) if runs else None
    return run


def find_runs(client: MlflowClient, experiments: Sequence[str], tag: str, value: str) -> Iterator[Run]:
    """All runs that bear this tag, deleted ones included; a thousand of them are one call."""
    from mlflow.entities import ViewType

    token, wanted = None, f"tags.`{tag}` = '{value}'"
    while token != "":
        page = client.search_runs(list(experiments), wanted, ViewType.ALL, max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def create_run(
    client: MlflowClient,
    experiment: str,
    identity: str,
    name: str,
    started: float,
    tags: Mapping[str, Any] | None = None,
) -> Run:
    """A new run, RUNNING; ``started`` in seconds since the epoch."""
    given = {key: text for key, value in (tags or {}).items() if (text := _text(value, LONGEST_TAG))}
    return client.create_run(experiment, int(started * 1000), {ID_TAG: identity, **given}, name)


def send_params(client: MlflowClient, run: Run, config: Mapping[str, Any]) -> None:
    """The configuration, flattened with dots; a param never changes in MLflow, so a changed one becomes a tag."""
    from mlflow.entities import Param

    values = {_name(key): text for key, text in flatten(redact_tree(config))}
    cut = sorted(key for key, text in values.items() if len(text) > LONGEST_PARAM)
    values = {key: shorten(text, LONGEST_PARAM) for key, text in values.items()}
    there = run.data.params
    for keys in chunks([key for key in values if key not in there], PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=[Param(key, values[key]) for key in keys])
    changed = {key: values[key] for key in values if key in there and there[key] != values[key]}
    send_tags(client, run, {"runner.cut_params": ", ".join(cut), "runner.changed_params": changed or ""})


def send_tags(client: MlflowClient, run: Run, tags: Mapping[str, Any]) -> None:
    """Set those tags that differ; an empty value takes the tag away."""
    from mlflow.entities import RunTag

    there, wanted = run.data.tags, {key: _text(value, LONGEST_TAG) for key, value in tags.items()}
    changed = [key for key, text in wanted.items() if text and there.get(key) != text]
    for keys in chunks(changed, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, tags=[RunTag(key, wanted[key]) for key in keys])
        there.update({key: wanted[key] for key in keys})
    for key in [key for key, text in wanted.items() if not text and key in there]:
        client.delete_tag(run.info.run_id, key)
        del there[key]


def known_steps(client: MlflowClient, run: Run) -> Known:
    """The steps that MLflow has, of every metric of the run."""
    names = client.get_run(run.info.run_id).data.metrics
    history = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return defaultdict(set, {name: {metric.step for metric in points} for name, points in history.items()})


def send_metrics(client: MlflowClient, run: Run, records: Iterable[Mapping[str, Any]], known: Known) -> None:
    """Those points that are not ``known`` yet; MLflow takes a batch whole or not at all."""
    from mlflow.entities import Metric

    def points(record: Mapping[str, Any]) -> list[Metric]:
        step, time_ms = int(record["step"]), int(record["time"] * 1000)
        named = {_name(key): value for key, value in record.items() if key not in ("step", "time")}
        return [Metric(key, float(value), time_ms, step) for key, value in named.items() if step not in known[key]]

    for batch in batches(map(points, records), METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=batch)
        for metric in batch:
            known[metric.key].add(metric.step)


def send_evaluations(client: MlflowClient, run: Run, records: Iterable[Mapping[str, Any]]) -> None:
    """Those metrics of {time, step, metrics} that MLflow does not have: known by name, step and time."""
    from mlflow.entities import Metric

    points = [
        Metric(_name(name), float(value), int(record["time"] * 1000), int(record["step"]))
        for record in records
        for name, value in record["metrics"].items()
    ]
    there = {
        (name, point.step, point.timestamp)
        for name in {point.key for point in points}
        for point in client.get_metric_history(run.info.run_id, name)
    }
    lacking = [point for point in points if (point.key, point.step, point.timestamp) not in there]
    for batch in chunks(lacking, METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=batch)


def send_dataset(client: MlflowClient, run: Run, data: Mapping[str, Any]) -> None:
    """The rows that the run trains on, as an input of the run: name, digest, source and numbers."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest, there = str(data.get("digest", ""))[:LONGEST_DIGEST], run.inputs.dataset_inputs
    if not digest or digest in [given.dataset.digest for given in there]:
        return
    numbers = {key: value for key, value in (data.get("report") or {}).items() if isinstance(value, int | float)}
    kind, source = _source(str(data.get("uri", "")))
    name = str(data.get("name", "data"))[:LONGEST_NAME]
    dataset = Dataset(name, digest, kind, json.dumps(source), profile=json.dumps(numbers))
    there.append(DatasetInput(dataset, [InputTag("mlflow.data.context", "training")]))
    client.log_inputs(run.info.run_id, there[-1:])


def send_model(client: MlflowClient, run: Run, name: str, kind: str, params: Mapping[str, str], step: int) -> None:
    """Name the model that the run made as its output, for the column Models; its files are artifacts of the run."""
    if MODEL_TAG in run.data.tags or not hasattr(client, "create_logged_model"):  # from MLflow 3 on
        return
    from mlflow.entities import LoggedModelOutput

    about = f"Its files: artifacts/model of run {run.info.run_id}. `python -m runner register` makes it loadable here."
    tags = {"mlflow.note.content": about, "runner.run_id": run.info.run_id}
    made = client.create_logged_model(
        run.info.experiment_id, plain(name), run.info.run_id, tags, dict(params), model_type=kind
    )
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(made.model_id, step)])
    send_tags(client, run, {MODEL_TAG: made.model_id})


def plain(name: str) -> str:
    """A name that MLflow takes for a logged model."""
    return re.sub(r"[^\w-]", "-", name)


def send_table(client: MlflowClient, run: Run, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Rows as a table that MLflow shows; ``log_table`` would append to the one there at every resume."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
    client.log_text(run.info.run_id, json.dumps(table, ensure_ascii=False), name)
    send_tags(client, run, {"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])})


def set_status(client: MlflowClient, run: Run, status: str, ended: float | None) -> None:
    """An end at that time (seconds since the epoch); where ``ended`` is None it is SCHEDULED or RUNNING again."""
    if ended is None:
        client.update_run(run.info.run_id, status)
    else:
        client.set_terminated(run.info.run_id, status, int(ended * 1000))


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"lora": {"r": 8}}`` → ``("lora.r", "8")``; values as they are written in YAML."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        # An empty text gets quotes: MLflow's server takes no empty value.
        yield prefix, tree if isinstance(tree, str) and tree else json.dumps(tree, ensure_ascii=False, default=str)


def shorten(text: str, limit: int) -> str:
    """The text within ``limit`` characters; where something is cut, the end says so."""
    mark = f" … [cut: {len(text)} characters; whole in config.yaml]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def batches(groups: Iterable[list[T]], limit: int) -> Iterator[list[T]]:
    """The groups in lists of at most ``limit`` items; a group is split only if it alone is larger than that."""
    batch: list[T] = []
    for group in groups:
        if batch and len(batch) + len(group) > limit:
            yield batch
            batch = []
        batch = batch + group
        while len(batch) > limit:
            yield batch[:limit]
            batch = batch[limit:]
    if batch:
        yield batch


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def with_credentials(uri: str) -> str:
    """A database takes user and password in its URI only; a server is told them by MLflow, from the environment."""
    if is_server(uri):
        return uri
    return put_credentials(uri, os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD"))


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)
    return shorten(text, limit)


def _name(key: str) -> str:
    """The key with what MLflow does not take in names (anything but ``/ . - : _`` space and letters) replaced."""
    name = re.sub(r"[^/\w.\- :]", "_", key)[:LONGEST_NAME]
    return name if posixpath.normpath(name) == name and not name.startswith(("/", "..")) else name.replace("/", "_")


def _source(uri: str) -> tuple[str, dict[str, str]]:
    if uri.startswith("hf://"):
        return "hugging_face", {"path": uri.removeprefix("hf://").removeprefix("datasets/")}
    return ("http", {"url": uri}) if is_server(uri) else ("local", {"uri": uri})
