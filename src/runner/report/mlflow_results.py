"""Read the results of runs from an MLflow store, all runs with one query.

sqlite databases are read with SQL and servers over REST, because importing MLflow and building the client's objects
for a thousand runs takes longer than the query. Other databases are read with MLflow's client.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

from runner.config import choices
from runner.errors import Fault, TrackingError, UnknownNameError, suggest
from runner.files import user_path
from runner.report.record import STATUS
from runner.report.results import TRAINING, UI, Result
from runner.report.store_lookup import may_be_id, tracking_errors
from runner.secrets import take_credentials
from runner.tracking.metrics_log import last_values
from runner.tracking.mlflow import rest, store
from runner.tracking.mlflow.tags import MODEL_METRICS

MOST_RUNS = 50_000
"""The largest page size of MLflow."""
SHOWN_ID = 8
CALLS_AT_ONCE = 8

Point = tuple[int, float, float]
"""(step, seconds since the epoch, value)"""


@dataclass
class StoredRun:
    """A run in the MLflow store."""

    run_id: str
    name: str
    status: str
    started: float
    """Seconds since the epoch."""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    experiment: str = ""
    """Its id."""


class Store(Protocol):
    """Read access to an MLflow store."""

    def experiments(self) -> dict[str, str]:
        """Name → id of all experiments that are not deleted."""

    def runs(self, experiments: Sequence[str]) -> list[StoredRun]:
        """All runs of these experiments (ids) that are not deleted."""

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        """(run id, metric, its points sorted by step) for each run and metric."""


def read(uri: str, words: Sequence[str]) -> list[Result]:
    """The results of the runs of these experiments, or of these sweeps and runs; without words, of the only experiment.

    Raises:
        UnknownNameError: the store has no experiment, sweep or run of this name.
        TrackingError: the store cannot be read, or the words are ambiguous.
    """
    with tracking_errors(uri):
        source = opened(uri)
        known = source.experiments()
        chosen = _chosen(known, words, uri)
        rows = source.runs([known[name] for name in chosen] or list(known.values()))
    children = [row for row in rows if "runner.jobs" not in row.tags]
    if not chosen and words:
        children = _of_sweeps(children, words, known, uri)
    return [_result(row, uri) for row in children]


def records(uri: str, run_ids: Sequence[str], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Run id → its records as in metrics.jsonl, with only these metrics.

    Raises:
        TrackingError: the store cannot be read.
    """
    grouped: dict[str, dict[tuple[int, str], dict[str, Any]]] = {run_id: {} for run_id in run_ids}
    try:
        for run_id, name, points in opened(uri).history(run_ids, names):
            kind = name.partition("/")[0]  # train and eval metrics of one step are two records
            for step, time, value in points:
                grouped[run_id].setdefault((step, kind), {"step": step, "time": time})[name] = value
    except Exception as error:
        remedy = "try again, or compare without --html and --png"
        raise TrackingError(Fault("uri", store.explained(error, uri), remedy)) from error
    order = {"train": 0, "eval": 1}
    return {
        run_id: [by_step[key] for key in sorted(by_step, key=lambda key: (key[0], order.get(key[1], 2)))]
        for run_id, by_step in grouped.items()
    }


def opened(uri: str) -> Store:
    """The reader for this kind of store."""
    if uri.startswith("sqlite:"):
        return _Sqlite(Path(uri.removeprefix("sqlite:///")))
    return _Server(uri) if store.is_server(uri) else _Client(uri)


def _chosen(known: dict[str, str], words: Sequence[str], uri: str) -> list[str]:
    """The experiments named by the words; empty if the words name sweeps or runs."""
    if not words:
        own = [name for name in known if name != "Default"] or list(known)
        if len(own) != 1:
            problem, remedy = f"contains {len(own)} experiments", f"choose one: {', '.join(own)}"
            raise TrackingError(Fault("uri", problem, remedy, _plain(uri)))
        return own
    if (experiments := [word for word in words if word in known]) and len(experiments) < len(words):
        others = ", ".join(word for word in words if word not in known)
        problem = f"'{experiments[0]}' is an experiment, but {others} is not"
        raise TrackingError(Fault("", problem, "name only experiments, or only sweeps and runs"))
    return experiments


def _of_sweeps(rows: Sequence[StoredRun], words: Sequence[str], known: dict[str, str], uri: str) -> list[StoredRun]:
    """The runs named by the words: a word is a sweep, the name of a run, or the beginning of a run id."""
    sweeps = {row.tags.get("runner.sweep", "") for row in rows} - {""}
    chosen: dict[str, StoredRun] = {}
    for word in words:
        matches = [row for row in rows if row.tags.get("runner.sweep") == word]
        matches = matches or [row for row in rows if row.name == word]
        matches = matches or [row for row in rows if may_be_id(word) and row.run_id.startswith(word)]
        if not matches:
            hint = suggest(word, [*known, *sweeps])
            available = f"experiments: {', '.join(known)}; sweeps: {', '.join(sorted(sweeps)) or 'none'}"
            if os.path.exists(user_path(word)):
                hint = "to compare folders, leave out uri=…; for runs in this store, use their names there;"
            problem = f"there is no experiment, sweep or run '{word}' in {_plain(uri)}"
            raise UnknownNameError(Fault("", problem, f"{hint} {available}".strip()))
        chosen.update({row.run_id: row for row in matches})
    return list(chosen.values())


def _plain(uri: str) -> str:
    """The URI without user and password."""
    return take_credentials(uri)[0]


def _result(row: StoredRun, uri: str) -> Result:
    tags, page = row.tags, f"/#/experiments/{row.experiment}/runs/{row.run_id}?{TRAINING}"
    params, implied = choices.named(row.params, {**choices.of_overrides(row.name.split(",")), **row.params})
    folder = tags.get("runner.folder", "")
    finite = {name: value for name, value in row.metrics.items() if abs(value) < store.INFINITY}
    selected = json.loads(tags.get(MODEL_METRICS) or "{}")
    return Result(
        run=row.run_id[:SHOWN_ID],
        label=row.name,
        status=tags.get("runner.status") or STATUS.get(row.status, row.status.lower()),
        reason=tags.get("runner.reason", ""),
        params=params,
        implied=implied,
        metrics=last_values([{"step": 0, **finite, **selected}]),
        sweep=tags.get("runner.sweep", ""),
        folder=folder if folder and Path(folder).is_dir() else "",
        mlflow_id=row.run_id,
        mlflow_url=(_plain(uri).rstrip("/") if store.is_server(uri) else UI) + page,
        task_metrics=tuple(tags.get("runner.task_metrics", "").split()),
        created=row.started,
        came_from=tags.get("runner.chain", ""),
    )


@dataclass(frozen=True)
class _Sqlite:
    """An MLflow sqlite database, read with SQL; these tables have kept their columns since MLflow 1.0."""

    path: Path

    def experiments(self) -> dict[str, str]:
        if not self.path.is_file():
            raise TrackingError(Fault("uri", f"there is no database {self.path}", "default: uri=outputs/mlflow.db"))
        query = "SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active'"
        (rows,) = store.read_sqlite(self.path, [query])
        return {name: str(experiment_id) for name, experiment_id in rows}

    def runs(self, experiments: Sequence[str]) -> list[StoredRun]:
        chosen = f"experiment_id IN ({','.join('?' * len(experiments))}) AND lifecycle_stage = 'active'"
        of_runs = f"run_uuid IN (SELECT run_uuid FROM runs WHERE {chosen})"
        runs, params, tags, metrics = store.read_sqlite(
            self.path,
            [
                f"SELECT run_uuid, name, status, start_time, experiment_id FROM runs WHERE {chosen}",
                f"SELECT run_uuid, key, value FROM params WHERE {of_runs}",
                f"SELECT run_uuid, key, value FROM tags WHERE {of_runs}",
                f"SELECT run_uuid, key, value FROM latest_metrics WHERE NOT is_nan AND {of_runs}",
            ],
            [int(experiment_id) for experiment_id in experiments],
        )
        rows = {
            run: StoredRun(run, name or run, status, (start or 0) / 1000, experiment=str(experiment))
            for run, name, status, start, experiment in runs
        }
        for run, key, text in params:
            rows[run].params[key] = text
        for run, key, text in tags:
            rows[run].tags[key] = text
        for run, key, value in metrics:
            rows[run].metrics[key] = value
        return list(rows.values())

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        chosen = f"run_uuid IN ({','.join('?' * len(run_ids))}) AND key IN ({','.join('?' * len(names))})"
        query = f"SELECT run_uuid, key, step, timestamp, value FROM metrics WHERE NOT is_nan AND {chosen} ORDER BY step"
        curves: dict[tuple[str, str], list[Point]] = {}
        (rows,) = store.read_sqlite(self.path, [query], [*run_ids, *names])
        for run, key, step, time_ms, value in rows:
            curves.setdefault((run, key), []).append((step, time_ms / 1000, value))
        return ((run, key, points) for (run, key), points in curves.items())


@dataclass(frozen=True)
class _Server:
    """An MLflow server, read with the REST API 2.0."""

    uri: str

    def experiments(self) -> dict[str, str]:
        page = rest.ask(self.uri, "experiments/search", {"max_results": MOST_RUNS})
        return {each["name"]: each["experiment_id"] for each in page.get("experiments", [])}

    def runs(self, experiments: Sequence[str]) -> list[StoredRun]:
        rows, token = [], ""
        while True:
            query = {"experiment_ids": list(experiments), "max_results": MOST_RUNS, "page_token": token}
            page = rest.ask(self.uri, "runs/search", {key: value for key, value in query.items() if value})
            rows += [self._row(run["info"], run.get("data") or {}) for run in page.get("runs", [])]
            if not (token := page.get("next_page_token", "")):
                return rows

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        def download(curve: tuple[str, str]) -> tuple[str, str, list[Point]]:
            query = urlencode({"run_id": curve[0], "metric_key": curve[1]})
            metrics = rest.ask(self.uri, f"metrics/get-history?{query}").get("metrics", [])
            points = [(int(one.get("step", 0)), int(one["timestamp"]) / 1000, float(one["value"])) for one in metrics]
            return *curve, sorted(points)

        with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
            yield from pool.map(download, [(run_id, name) for run_id in run_ids for name in names])

    @staticmethod
    def _row(info: dict[str, Any], data: dict[str, Any]) -> StoredRun:
        def pairs(kind: str) -> dict[str, Any]:
            return {each["key"]: each.get("value", "") for each in data.get(kind, [])}

        metrics = {key: float(value) for key, value in pairs("metrics").items()}
        name = info.get("run_name") or info["run_id"]
        started = int(info.get("start_time", 0)) / 1000
        named = pairs("params"), metrics, pairs("tags"), info.get("experiment_id", "")
        return StoredRun(info["run_id"], name, info["status"], started, *named)


@dataclass(frozen=True)
class _Client:
    """Any other database, read with MLflow's client."""

    uri: str

    def experiments(self) -> dict[str, str]:
        experiments = store.connect(self.uri).search_experiments(max_results=MOST_RUNS)
        return {each.name: each.experiment_id for each in experiments}

    def runs(self, experiments: Sequence[str]) -> list[StoredRun]:
        runs: Iterable[Any] = store.connect(self.uri).search_runs(list(experiments), max_results=MOST_RUNS)
        return [
            StoredRun(run.info.run_id, run.info.run_name, run.info.status, run.info.start_time / 1000,
                      dict(run.data.params), dict(run.data.metrics), dict(run.data.tags), run.info.experiment_id)
            for run in runs
        ]  # fmt: skip

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        client = store.connect(self.uri)
        for run_id in run_ids:
            for name in names:
                points = client.get_metric_history(run_id, name)
                yield run_id, name, sorted((one.step, one.timestamp / 1000, one.value) for one in points)
