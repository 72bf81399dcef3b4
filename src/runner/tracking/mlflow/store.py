"""Open an MLflow store; find or create experiments and runs in it. The contents of runs: see ``upload``."""

from __future__ import annotations

import functools
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import environment_variables
from runner.errors import Fault, RunnerError, TrackingError
from runner.files import locked
from runner.secrets import put_credentials, redact, take_credentials
from runner.tracking.mlflow import rest, views
from runner.tracking.trackers import NOT_IN_PATH

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ID_TAG, LONGEST_TAG = "runner.id", 8000
INFINITY = 1.7976931348623157e308
"""The number that MLflow stores for infinity."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow retries for four minutes by default; the callers of this module have their own retries.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""Defaults for MLflow's environment variables; the user's own values have priority."""


@functools.cache
def connect(uri: str) -> MlflowClient:
    """A client for the store. Creates a missing sqlite database (3 s on two cores)."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for each error that we report
    if not uri.startswith("sqlite:"):
        _use(uri := with_credentials(uri))
        return mlflow.MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    if any(character in uri for character in NOT_IN_PATH):  # a run that was offline, or whose folder was moved
        problem = f"MLflow cannot open a database with {' or '.join(NOT_IN_PATH)} in its path"
        raise TrackingError(Fault("uri", problem, "use another store with uri=…, or move the outputs folder", database))
    # Two processes that open a new database file at the same time corrupt it: MlflowClient opens it, so take a lock.
    with locked(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            _make(database)
        _use(uri)
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _use(uri: str) -> None:
    """Set MLflow's tracking URI: older MLflow versions use it for artifacts, not the client's.

    MLflow also writes it into the environment, where it would look like a choice of the user.
    """
    import mlflow

    with environment_variables.kept("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(uri)


def _make(database: Path) -> None:
    """Create a sqlite database under a temporary name: MLflow cannot open one whose creation was interrupted."""
    import mlflow

    temporary = database.with_name(f".{database.name}.new")
    for file in (temporary, temporary.with_name(f"{temporary.name}-journal")):
        file.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
    temporary.rename(database)


def answers(uri: str) -> bool:
    """Whether the store answers a query."""
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception:  # connection refused, timeout, locked database, old schema, …
        return False
    return True


def read_sqlite(database: Path, queries: Sequence[str], values: Sequence[Any] = ()) -> list[list[Any]]:
    """Rows of each query on MLflow's database, in one transaction (a consistent snapshot), without importing MLflow.

    The columns of the tables have not changed since MLflow 1.0.
    """
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
        connection.execute("BEGIN")
        return [connection.execute(query, list(values)).fetchall() for query in queries]


def known_identities(uri: str, identities: Sequence[str]) -> set[str]:
    """Those of the ids (``id`` of the manifest) that a run of this sqlite database has, deleted or not."""
    marks = ",".join("?" * len(identities))
    query = f"SELECT value FROM tags WHERE key = '{ID_TAG}' AND value IN ({marks})"
    return {value for (value,) in read_sqlite(Path(uri.removeprefix("sqlite:///")), [query], identities)[0]}


def is_there(uri: str) -> bool:
    """False for a sqlite database whose file does not exist; True for all other stores."""
    return not uri.startswith("sqlite:") or Path(uri.removeprefix("sqlite:///")).exists()


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def experiment_id(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """Id of the experiment, created if missing, with artifacts under ``artifacts`` (None: the server decides).

    Its page opens with the view of ``views``.

    Raises:
        TrackingError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            location = artifacts.absolute().as_uri() if artifacts else None
            return str(client.create_experiment(name, location, views.tags()))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # created by another process meanwhile
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        remedy = f"restore it (mlflow experiments restore), or set tracking.experiment to another name than {name}"
        raise TrackingError(Fault("tracking.experiment", "was deleted in MLflow", remedy, name))
    views.keep(client, experiment.experiment_id, experiment.tags)
    return str(experiment.experiment_id)


def find_run(client: MlflowClient, experiment: str, identity: str, recorded_id: str | None) -> Run | None:
    """The run with the id in the manifest, else the run with the tag ``runner.id``; None if MLflow has neither.

    The tag is set when the run is created: so a crash before its id is recorded does not cause a second run.

    Raises:
        TrackingError: the run was deleted.
    """
    run = find_any_run(client, experiment, identity, recorded_id)
    if run is not None and run.info.lifecycle_stage != "active":
        remedy = f"restore it: mlflow runs restore --run-id {run.info.run_id}"
        raise TrackingError(Fault("", f"the MLflow run {run.info.run_id} was deleted", remedy))
    return run


def find_any_run(client: MlflowClient, experiment: str, identity: str, recorded_id: str | None) -> Run | None:
    """Like ``find_run``, but also returns a deleted run, which can be restored."""
    run = with_id(client, recorded_id)
    if run is None or run.data.tags.get(ID_TAG) != identity:
        runs = _with_identity(client, experiment, identity)
        run = client.get_run(runs[0].info.run_id) if runs else None
    return run


def with_id(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run with this id of MLflow's, deleted or not; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _with_identity(client: MlflowClient, experiment: str, identity: str) -> list[Run]:
    """All runs of this identity, the one to use first: not deleted, and with the most metrics."""
    from mlflow.entities import ViewType

    runs = client.search_runs([experiment], f"tags.`{ID_TAG}` = '{identity}'", run_view_type=ViewType.ALL)
    return sorted(runs, key=lambda run: (run.info.lifecycle_stage != "active", -len(run.data.metrics), run.info.run_id))


def create_run(
    client: MlflowClient,
    experiment: str,
    identity: str,
    name: str,
    started: float,
    tags: Mapping[str, Any] | None = None,
) -> Run:
    """Create a run with status RUNNING; ``started`` in seconds since the epoch.

    A server may create the run although its answer is lost, and MLflow's client then asks a second time: so the runs of
    this identity are searched afterwards, one is kept, and the others are closed.
    """
    texts = {key: text for key, value in (tags or {}).items() if (text := as_text(value, LONGEST_TAG))}
    try:
        run = client.create_run(experiment, int(started * 1000), {ID_TAG: identity, **texts}, name)
    except Exception:
        if not (runs := _with_identity(client, experiment, identity)):
            raise
        run = client.get_run(runs[0].info.run_id)
    if is_server(client.tracking_uri):
        close_doubles(client, run, identity)
    return run


def close_doubles(client: MlflowClient, kept: Run, identity: str) -> int:
    """Close all other runs of this identity, and delete those without metrics; returns their number.

    Only a request that was sent twice creates such a run; MLflow can restore a deleted one.
    """
    doubles = [
        run for run in _with_identity(client, kept.info.experiment_id, identity)
        if run.info.run_id != kept.info.run_id and run.info.lifecycle_stage == "active"
    ]  # fmt: skip
    for run in doubles:
        client.set_tag(run.info.run_id, "runner.double_of", kept.info.run_id)
        if run.info.status in ("RUNNING", "SCHEDULED"):
            client.set_terminated(run.info.run_id, "KILLED", run.info.start_time)
        if not run.data.metrics:
            client.delete_run(run.info.run_id)
    return len(doubles)


def with_credentials(uri: str) -> str:
    """Add the credentials of the environment to a database URI. For a server, MLflow itself reads the environment."""
    if is_server(uri):
        return uri
    return put_credentials(uri, os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD"))


def shorten(text: str, limit: int) -> str:
    """Truncate the text to ``limit`` characters, with a mark at the end."""
    mark = f" … [cut: {len(text)} characters; whole in config.yaml]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def as_text(value: Any, limit: int) -> str:
    """The value as text, truncated to ``limit`` characters."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)
    return shorten(text, limit)


def explained(error: Exception, uri: str) -> str:
    """The error in one line, without secrets."""
    if is_server(uri) and (reason := rest.reason_of(error)):
        return redact(f"the MLflow server {take_credentials(uri)[0]} does not answer: {reason}")
    store_name = "the embedded database" if not is_server(uri) else "the server"
    text = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        text = f"it cannot be opened for writing: {error.strerror}"
    elif "readonly database" in str(error):
        text = "it cannot be written: it is read-only for this user"
    return redact(f"MLflow ({store_name}, {take_credentials(uri)[0]}): {text[:600]}")
