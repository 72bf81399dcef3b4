"""Upload the contents of a run to MLflow: params, tags, metrics, dataset, model, tables and status.

Every function is idempotent: it sends only what MLflow does not have yet.
Limits of MLflow (3.17): 100 params, 100 tags or 1000 metrics per batch; 6000 characters per param, 8000 per tag.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from runner.config.bind import flatten
from runner.secrets import redact_tree
from runner.tracking.mlflow.store import LONGEST_TAG, as_text, is_server, shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

Known = dict[str, set[int]]
"""Metric name → steps that are already in MLflow."""

PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000
LONGEST_PARAM, LONGEST_NAME, LONGEST_DIGEST = 6000, 250, 36
MODEL_TAG = "runner.model_id"
T = TypeVar("T")


def send_params(
    client: MlflowClient, run: Run, config: Mapping[str, Any], choices: Mapping[str, str] | None = None
) -> None:
    """The configuration, flattened with dots, and the options chosen (``quant=4bit``).

    MLflow cannot change params: changed values go into a tag.
    """
    from mlflow.entities import Param

    values = {_name(key): text for key, text in flatten(redact_tree(config)) if key} | dict(choices or {})
    truncated = sorted(key for key, text in values.items() if len(text) > LONGEST_PARAM)
    values = {key: shorten(text, LONGEST_PARAM) for key, text in values.items()}
    existing = run.data.params
    for keys in chunks([key for key in values if key not in existing], PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=[Param(key, values[key]) for key in keys])
    changed = {key: values[key] for key in values if key in existing and existing[key] != values[key]}
    send_tags(client, run, {"runner.cut_params": ", ".join(truncated), "runner.changed_params": changed or ""})


def send_tags(client: MlflowClient, run: Run, tags: Mapping[str, Any]) -> None:
    """Set the tags that differ; an empty value deletes the tag."""
    from mlflow.entities import RunTag

    existing, texts = run.data.tags, {key: as_text(value, LONGEST_TAG) for key, value in tags.items()}
    changed = [key for key, text in texts.items() if text and existing.get(key) != text]
    for keys in chunks(changed, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, tags=[RunTag(key, texts[key]) for key in keys])
        existing.update({key: texts[key] for key in keys})
    for key in [key for key, text in texts.items() if not text and key in existing]:
        client.delete_tag(run.info.run_id, key)
        del existing[key]


def known_steps(client: MlflowClient, run: Run) -> Known:
    """Metric name → steps in MLflow, for every metric of the run."""
    names = client.get_run(run.info.run_id).data.metrics
    history = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return defaultdict(set, {name: {metric.step for metric in points} for name, points in history.items()})


def send_metrics(client: MlflowClient, run: Run, records: Iterable[Mapping[str, Any]], known: Known) -> None:
    """The points that are not in ``known``, which is updated. MLflow stores a batch completely or not at all."""
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
    """The metrics of records {time, step, metrics} that are not in MLflow yet, compared by name, step and time."""
    from mlflow.entities import Metric

    points = [
        Metric(_name(name), float(value), int(record["time"] * 1000), int(record["step"]))
        for record in records
        for name, value in record["metrics"].items()
    ]
    existing = {
        (name, point.step, point.timestamp)
        for name in {point.key for point in points}
        for point in client.get_metric_history(run.info.run_id, name)
    }
    missing = [point for point in points if (point.key, point.step, point.timestamp) not in existing]
    for batch in chunks(missing, METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=batch)


def send_dataset(client: MlflowClient, run: Run, data: Mapping[str, Any]) -> None:
    """The training data as an MLflow dataset: name, digest, source and statistics; of a mixture each source."""
    for name, each in (data.get("sources") or {}).items():
        send_dataset(client, run, {**each, "name": name})
    if data.get("sources"):
        return
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    digest, inputs = str(data.get("digest", ""))[:LONGEST_DIGEST], run.inputs.dataset_inputs
    if not digest or digest in [existing.dataset.digest for existing in inputs]:
        return
    numbers = {key: value for key, value in (data.get("report") or {}).items() if isinstance(value, int | float)}
    kind, source = _source(str(data.get("uri", "")))
    name = str(data.get("name", "data"))[:LONGEST_NAME]
    dataset = Dataset(name, digest, kind, json.dumps(source), profile=json.dumps(numbers))
    inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", "training")]))
    try:
        client.log_inputs(run.info.run_id, inputs[-1:])
    except MlflowException as error:
        if "unique" not in str(error).lower():  # else another run has entered the same data at the same moment
            raise
        client.log_inputs(run.info.run_id, inputs[-1:])


def send_model(client: MlflowClient, run: Run, name: str, kind: str, params: Mapping[str, str], step: int) -> None:
    """Register the trained model as output of the run (column Models in MLflow); its files are run artifacts."""
    if MODEL_TAG in run.data.tags or not hasattr(client, "create_logged_model"):  # added in MLflow 3
        return
    from mlflow.entities import LoggedModelOutput

    about = f"`mlflow.pyfunc.load_model('runs:/{run.info.run_id}/model')` loads it where its base model is. "
    about += "`python -m runner register` makes the whole model loadable here."
    tags = {"mlflow.note.content": about, "runner.run_id": run.info.run_id}
    if not (models := _models(client, run)):
        try:
            client.create_logged_model(
                run.info.experiment_id, plain(name), run.info.run_id, tags, dict(params), model_type=kind
            )
        except Exception:
            if not _models(client, run):
                raise
        models = _models(client, run)
    model = models[0]
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
    send_tags(client, run, {MODEL_TAG: model.model_id})
    delete_double_models(client, run)


def delete_double_models(client: MlflowClient, run: Run) -> None:
    """Delete the other models of the run: only a request that was sent twice, as its answer was lost, creates them."""
    kept = run.data.tags.get(MODEL_TAG)
    for model in _models(client, run) if kept else []:
        if model.model_id != kept:
            client.delete_logged_model(model.model_id)


def _models(client: MlflowClient, run: Run) -> list[Any]:
    """The logged models that ``send_model`` created for the run."""
    query = f"tags.`runner.run_id` = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], query))


def plain(name: str) -> str:
    """The name with characters that MLflow forbids in model names replaced."""
    return re.sub(r"[^\w-]", "-", name)


TABLES_TAG, MOST_TABLES = "mlflow.loggedArtifacts", 100
"""The tag by which MLflow's pages find tables; it has a longest length."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as an MLflow table in JSON. MLflow's ``log_table`` would append the same rows again at every resume."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    content = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
    return json.dumps(content, ensure_ascii=False)


def send_table_tag(client: MlflowClient, run: Run, name: str) -> None:
    """Make MLflow's pages show the artifact ``name`` as a table."""
    tables = [each for each in json.loads(run.data.tags.get(TABLES_TAG) or "[]") if each.get("path") != name]
    tables = [*tables, {"path": name, "type": "table"}][-MOST_TABLES:]
    send_tags(client, run, {TABLES_TAG: json.dumps(tables)})


def send_table(client: MlflowClient, run: Run, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Upload rows as an MLflow table."""
    client.log_text(run.info.run_id, table(rows), name)
    send_table_tag(client, run, name)


def set_status(client: MlflowClient, run: Run, status: str, ended: float | None) -> None:
    """Set the status, with the end time ``ended`` (seconds since the epoch); None for SCHEDULED and RUNNING."""
    if ended is None:
        client.update_run(run.info.run_id, status)
    else:
        client.set_terminated(run.info.run_id, status, int(ended * 1000))


def batches(groups: Iterable[list[T]], limit: int) -> Iterator[list[T]]:
    """Join groups to lists of at most ``limit`` items; splits only groups larger than ``limit``."""
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


def _name(key: str) -> str:
    """The key with characters that MLflow forbids in names (all but ``/ . - : _``, space and letters) replaced."""
    name = re.sub(r"[^/\w.\- :]", "_", key)[:LONGEST_NAME]
    return name if posixpath.normpath(name) == name and not name.startswith(("/", "..")) else name.replace("/", "_")


def _source(uri: str) -> tuple[str, dict[str, str]]:
    if uri.startswith("hf://"):
        return "hugging_face", {"path": uri.removeprefix("hf://").removeprefix("datasets/")}
    return ("http", {"url": uri}) if is_server(uri) else ("local", {"uri": uri})
