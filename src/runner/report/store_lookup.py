"""Find a run in an MLflow store by its name or the beginning of its id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import terminal
from runner.errors import ConfigError, Fault, RunnerError, TrackingError, refuse, suggest
from runner.secrets import redact
from runner.tracking import lookup, trackers
from runner.tracking.manifest import keep_credentials
from runner.tracking.mlflow import store

SHOWN, LATEST = 8, 200


class UnknownRunError(ConfigError):
    """The store has no such run."""


def run_id_of(word: str, uri: str) -> str:
    """The id of the run that ``word`` names: its name, or the beginning of its id.

    Raises:
        UnknownRunError: the store has no such run.
        ConfigError: the store has several such runs.
    """
    heads = _heads_of_database if uri.startswith("sqlite:") else _heads
    return _only(*heads(word, uri), word, uri).run_id


def tags_of_database(run_id: str, uri: str) -> dict[str, str]:
    """The tags of a run, read with SQL because importing MLflow takes seconds."""
    (rows,) = store.read_sqlite(_file(uri), ["SELECT key, value FROM tags WHERE run_uuid = ?"], [run_id])
    return dict(rows)


def checked(uri: str) -> str:
    """Check the URI of a store, and move its credentials into MLflow's environment variables; returns the rest.

    Raises:
        ConfigError: the URI is invalid.
        TrackingError: the database file does not exist.
    """
    refuse(trackers.check_mlflow(uri=uri, experiment="runner", run_name=None))
    node = {"tracking": {"uri": uri}}
    keep_credentials(node)
    uri = str(node["tracking"]["uri"])
    if uri.startswith("sqlite:") and not _file(uri).exists():
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
        raise TrackingError(Fault("uri", store.explained(error, uri), remedy)) from error


def may_be_id(word: str) -> bool:
    """Whether ``word`` may be the beginning of a run id."""
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
    names = terminal.distinct_names([head.name for head in heads[:SHOWN]], lookup.WIDEST)
    lines = (f"{head.run_id}  {name}  {head.status}" for head, name in zip(heads, names, strict=False))
    return redact("".join(f"\n      {line}" for line in lines))


def _heads_of_database(word: str, uri: str) -> tuple[list[_Head], list[_Head]]:
    """(runs that match ``word``, the latest runs), read with SQL because importing MLflow takes seconds."""
    (rows,) = store.read_sqlite(
        _file(uri),
        [
            "SELECT run_uuid, COALESCE(runs.name, ''), status FROM runs JOIN experiments USING (experiment_id) "
            "WHERE runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active' ORDER BY start_time DESC"
        ],
    )
    heads = [_Head(*row) for row in rows]
    matches = [head for head in heads if may_be_id(word) and head.run_id.startswith(word)]
    return matches or [head for head in heads if head.name == word], heads[:LATEST]


def _heads(word: str, uri: str) -> tuple[list[_Head], list[_Head]]:
    """(runs that match ``word``, the latest runs), read with MLflow's client."""
    client = store.connect(uri)
    experiments = [str(each.experiment_id) for each in client.search_experiments()]

    def search(query: str, count: int) -> list[_Head]:
        runs = client.search_runs(experiments, query, max_results=count)
        return [_Head(run.info.run_id, run.info.run_name or "", run.info.status) for run in runs]

    matches = search(f"attributes.run_id LIKE '{word}%'", SHOWN + 1) if may_be_id(word) else []
    if not matches and not {"'", '"'} <= set(word):
        quote = '"' if "'" in word else "'"
        matches = search(f"attributes.run_name = {quote}{word}{quote}", SHOWN + 1)
    return matches, [] if matches or not experiments else search("", LATEST)


def _file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))
