"""What came of runs, read from an MLflow store with one query for all of them.

A sqlite database is asked in SQL and a server over its REST API: importing MLflow, and the objects that its client
makes of a thousand runs, take longer than the answer. Other databases are asked through its client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

from runner.config import choices
from runner.errors import Fault, TrackingError, UnknownNameError, suggest
from runner.report.record import STATUS
from runner.report.results import Result
from runner.secrets import take_credentials
from runner.tracking import lookup
from runner.tracking.metrics_log import last_values
from runner.tracking.mlflow import rest, store
from runner.tracking.mlflow.run import explained

MOST_RUNS = 50_000
"""The largest page that MLflow gives: all runs come in one."""
SHOWN_ID = 8
CALLS_AT_ONCE = 8

Point = tuple[int, float, float]
"""(step, seconds since the epoch, value)"""


@dataclass
class Row:
    """A run as the store has it."""

    run_id: str
    name: str
    status: str
    started: float
    """Seconds since the epoch."""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Store(Protocol):
    """What a store is asked."""

    def experiments(self) -> dict[str, str]:
        """Name → id of those that are not deleted."""

    def runs(self, experiments: Sequence[str]) -> list[Row]:
        """Every run of these experiments (their ids) that is not deleted, in one query."""

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        """(run id, metric, its points in the order of steps)."""


def read(uri: str, words: Sequence[str]) -> list[Result]:
    """The results of all runs of the experiments, or of the sweeps, that the words name; no word: the one experiment.

    Raises:
        UnknownNameError: the store has none of that name.
        TrackingError: it does not answer, or what is meant cannot be told.
    """
    try:
        there = opened(uri)
        known = there.experiments()
        chosen = _chosen(known, words, uri)
        rows = there.runs([known[name] for name in chosen] or list(known.values()))
    except TrackingError:
        raise
    except Exception as error:  # a store fails in a hundred ways
        remedy = (
            "check the address, and whether the server runs" if store.is_server(uri) else "is that MLflow's database?"
        )
        raise TrackingError(Fault("uri", explained(error, uri), remedy)) from error
    children = [row for row in rows if "runner.jobs" not in row.tags]
    if not chosen and words:
        children = _of_sweeps(children, words, known, uri)
    return [_result(row) for row in children]


def records(uri: str, run_ids: Sequence[str], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Run id → its records, as metrics.jsonl would hold them, with these metrics alone.

    Raises:
        TrackingError: the store does not answer.
    """
    found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {run_id: {} for run_id in run_ids}
    try:
        for run_id, name, points in opened(uri).history(run_ids, names):
            kind = name.partition("/")[0]  # an evaluation is a record of its own
            for step, time, value in points:
                found[run_id].setdefault((step, kind), {"step": step, "time": time})[name] = value
    except Exception as error:
        raise TrackingError(Fault("uri", explained(error, uri), "leave the charts out, or try again")) from error
    order = {"train": 0, "eval": 1}
    return {
        run_id: [by_step[key] for key in sorted(by_step, key=lambda key: (key[0], order.get(key[1], 2)))]
        for run_id, by_step in found.items()
    }


def opened(uri: str) -> Store:
    """The way to ask this store."""
    if uri.startswith("sqlite:"):
        return _Sqlite(Path(uri.removeprefix("sqlite:///")))
    return _Server(uri) if store.is_server(uri) else _Client(uri)


def _chosen(known: dict[str, str], words: Sequence[str], uri: str) -> list[str]:
    """The experiments that are meant; none where the words are to be looked for among the sweeps."""
    if not words:
        own = [name for name in known if name != "Default"] or list(known)
        if len(own) != 1:
            problem, remedy = f"holds {len(own)} experiments", f"name one: {', '.join(own)}"
            raise TrackingError(Fault("uri", problem, remedy, _plain(uri)))
        return own
    if (of := [word for word in words if word in known]) and len(of) < len(words):
        others = ", ".join(word for word in words if word not in known)
        problem = f"'{of[0]}' is an experiment, and {others} is not"
        raise TrackingError(Fault("", problem, "name experiments, or sweeps of one experiment"))
    return list(words) if of else []


def _of_sweeps(rows: Sequence[Row], words: Sequence[str], known: dict[str, str], uri: str) -> list[Row]:
    """The runs that are meant: those of a sweep, or one by its name or the beginning of its id."""
    names = {row.tags.get("runner.sweep", "") for row in rows} - {""}
    chosen: dict[str, Row] = {}
    for word in words:
        found = [row for row in rows if row.tags.get("runner.sweep") == word]
        found = found or [row for row in rows if row.name == word]
        found = found or [row for row in rows if len(word) >= lookup.SHORTEST_ID and row.run_id.startswith(word)]
        if not found:
            hint = suggest(word, [*known, *names])
            there = f"experiments: {', '.join(known)}; sweeps: {', '.join(sorted(names)) or 'none'}"
            if Path(word).expanduser().exists():
                hint = "folders are compared without uri=…, runs of a store by the names that they have there;"
            raise UnknownNameError(
                Fault("", f"there is no experiment, sweep or run '{word}' in {_plain(uri)}", f"{hint} {there}".strip())
            )
        chosen.update({row.run_id: row for row in found})
    return list(chosen.values())


def _plain(uri: str) -> str:
    """The address without a password."""
    return take_credentials(uri)[0]


def _result(row: Row) -> Result:
    tags = row.tags
    params, implied = choices.named(row.params, {**choices.of_overrides(row.name.split(",")), **row.params})
    folder = tags.get("runner.folder", "")
    finite = {name: value for name, value in row.metrics.items() if abs(value) < store.INFINITY}
    return Result(
        run=row.run_id[:SHOWN_ID],
        label=row.name,
        status=tags.get("runner.status") or STATUS.get(row.status, row.status.lower()),
        reason=tags.get("runner.reason", ""),
        params=params,
        implied=implied,
        metrics=last_values([{"step": 0, "time": 0, **finite}]),
        sweep=tags.get("runner.sweep", ""),
        folder=folder if folder and Path(folder).is_dir() else "",
        mlflow_id=row.run_id,
        created=row.started,
    )


@dataclass(frozen=True)
class _Sqlite:
    """MLflow's database read as it lies there: tables that have kept their columns since MLflow 1.0."""

    path: Path

    def experiments(self) -> dict[str, str]:
        if not self.path.is_file():
            raise TrackingError(Fault("uri", f"there is no database {self.path}", "name one that a run was tracked in"))
        (found,) = store.read_sqlite(
            self.path, ["SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active'"]
        )
        return {name: str(identity) for name, identity in found}

    def runs(self, experiments: Sequence[str]) -> list[Row]:
        chosen = f"experiment_id IN ({','.join('?' * len(experiments))}) AND lifecycle_stage = 'active'"
        among = f"run_uuid IN (SELECT run_uuid FROM runs WHERE {chosen})"
        found, params, tags, numbers = store.read_sqlite(
            self.path,
            [
                f"SELECT run_uuid, name, status, start_time FROM runs WHERE {chosen}",
                f"SELECT run_uuid, key, value FROM params WHERE {among}",
                f"SELECT run_uuid, key, value FROM tags WHERE {among}",
                f"SELECT run_uuid, key, value FROM latest_metrics WHERE NOT is_nan AND {among}",
            ],
            [int(identity) for identity in experiments],
        )
        rows = {run: Row(run, name or run, status, (start or 0) / 1000) for run, name, status, start in found}
        for run, key, text in params:
            rows[run].params[key] = text
        for run, key, text in tags:
            rows[run].tags[key] = text
        for run, key, number in numbers:
            rows[run].metrics[key] = number
        return list(rows.values())

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        chosen = f"run_uuid IN ({','.join('?' * len(run_ids))}) AND key IN ({','.join('?' * len(names))})"
        query = f"SELECT run_uuid, key, step, timestamp, value FROM metrics WHERE NOT is_nan AND {chosen} ORDER BY step"
        found: dict[tuple[str, str], list[Point]] = {}
        (points,) = store.read_sqlite(self.path, [query], [*run_ids, *names])
        for run, key, step, time_ms, number in points:
            found.setdefault((run, key), []).append((step, time_ms / 1000, number))
        return ((run, key, points) for (run, key), points in found.items())


@dataclass(frozen=True)
class _Server:
    """MLflow's REST API 2.0."""

    uri: str

    def experiments(self) -> dict[str, str]:
        found = rest.ask(self.uri, "experiments/search", {"max_results": MOST_RUNS})
        return {each["name"]: each["experiment_id"] for each in found.get("experiments", [])}

    def runs(self, experiments: Sequence[str]) -> list[Row]:
        rows, token = [], ""
        while True:
            wanted = {"experiment_ids": list(experiments), "max_results": MOST_RUNS, "page_token": token}
            page = rest.ask(self.uri, "runs/search", {key: value for key, value in wanted.items() if value})
            rows += [self._row(run["info"], run.get("data") or {}) for run in page.get("runs", [])]
            if not (token := page.get("next_page_token", "")):
                return rows

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        def ask(wanted: tuple[str, str]) -> tuple[str, str, list[Point]]:
            query = urlencode({"run_id": wanted[0], "metric_key": wanted[1]})
            points = rest.ask(self.uri, f"metrics/get-history?{query}").get("metrics", [])
            found = [(int(one.get("step", 0)), int(one["timestamp"]) / 1000, float(one["value"])) for one in points]
            return *wanted, sorted(found)

        with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
            yield from pool.map(ask, [(run_id, name) for run_id in run_ids for name in names])

    @staticmethod
    def _row(info: dict[str, Any], data: dict[str, Any]) -> Row:
        def pairs(kind: str) -> dict[str, Any]:
            return {each["key"]: each.get("value", "") for each in data.get(kind, [])}

        metrics = {key: float(value) for key, value in pairs("metrics").items()}
        name = info.get("run_name") or info["run_id"]
        started = int(info.get("start_time", 0)) / 1000
        return Row(info["run_id"], name, info["status"], started, pairs("params"), metrics, pairs("tags"))


@dataclass(frozen=True)
class _Client:
    """Any other database, through MLflow's own client."""

    uri: str

    def experiments(self) -> dict[str, str]:
        found = store.connect(self.uri).search_experiments(max_results=MOST_RUNS)
        return {each.name: each.experiment_id for each in found}

    def runs(self, experiments: Sequence[str]) -> list[Row]:
        found: Iterable[Any] = store.connect(self.uri).search_runs(list(experiments), max_results=MOST_RUNS)
        return [
            Row(run.info.run_id, run.info.run_name, run.info.status, run.info.start_time / 1000, dict(run.data.params),
                dict(run.data.metrics), dict(run.data.tags))
            for run in found
        ]  # fmt: skip

    def history(self, run_ids: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, list[Point]]]:
        client = store.connect(self.uri)
        for run_id in run_ids:
            for name in names:
                points = client.get_metric_history(run_id, name)
                yield run_id, name, sorted((one.step, one.timestamp / 1000, one.value) for one in points)
