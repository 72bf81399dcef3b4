"""MLflow stores: open one, find or make an experiment and a run in it. What a run says is sent by ``sending``."""

from __future__ import annotations

import functools
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import Fault, TrackingError
from runner.files import locked
from runner.secrets import put_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ID_TAG, LONGEST_TAG = "runner.id", 8000
INFINITY = 1.7976931348623157e308
"""What MLflow makes of an infinite number."""
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


def read_sqlite(database: Path, queries: Sequence[str], values: Sequence[Any] = ()) -> list[list[Any]]:
    """What MLflow's database answers to all queries as of one moment, without importing MLflow: others write meanwhile.

    The tables have kept their columns since MLflow 1.0.
    """
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
        connection.execute("BEGIN")
        return [connection.execute(query, list(values)).fetchall() for query in queries]


def is_there(uri: str) -> bool:
    """Whether the store may still be asked: a database whose file is gone may not."""
    return not uri.startswith("sqlite:") or Path(uri.removeprefix("sqlite:///")).exists()


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
    given = {key: text for key, value in (tags or {}).items() if (text := as_text(value, LONGEST_TAG))}
    return client.create_run(experiment, int(started * 1000), {ID_TAG: identity, **given}, name)


def with_credentials(uri: str) -> str:
    """A database takes user and password in its URI only; a server is told them by MLflow, from the environment."""
    if is_server(uri):
        return uri
    return put_credentials(uri, os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD"))


def shorten(text: str, limit: int) -> str:
    """The text within ``limit`` characters; where something is cut, the end says so."""
    mark = f" … [cut: {len(text)} characters; whole in config.yaml]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def as_text(value: Any, limit: int) -> str:
    """A value as MLflow takes it: no longer than ``limit``."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)
    return shorten(text, limit)
