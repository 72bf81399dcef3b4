"""The options of ``tracking``: upload run folders to MLflow, or keep them local.

The worker writes only to its run folder, so that a tracking server can neither slow down nor stop training. A separate
process, ``python -m runner.mirror FOLDER``, uploads the folder to MLflow and continues after the worker has ended.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from runner.config import user_code
from runner.config.bind import flatten
from runner.config.schema import Positive, Script, Text
from runner.errors import Fault, suggest
from runner.files import user_path
from runner.secrets import redact
from runner.tracking import other_trackers
from runner.tracking.other_trackers import Name

DRIVERS = {"sqlite": "sqlite3", "postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}
"""Databases that MLflow supports → the default driver module of SQLAlchemy."""
NOT_IN_PATH = ("?", "%")
"""Characters that are not literal in the URI of a sqlite database: SQLAlchemy would open another file."""
LONGEST_NAME = 250
TAG = re.compile(rf"[/\w.\- :]{{1,{LONGEST_NAME}}}")
"""The names of tags that MLflow admits."""


@dataclass(frozen=True)
class Tracking:
    """Settings for the upload of a run to MLflow."""

    kind: Literal["mlflow", "offline"]
    experiment: str
    run_name: str | None
    log_model: bool | Literal["adapter"]
    uri: str | None = None
    system_metrics: bool = False
    system_interval_s: float = 10.0
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the user; names below others are joined with dots."""
    notes: str | None = None
    also: tuple[str, ...] = ()
    """Trackers besides MLflow."""
    webhook: str | None = None
    """Scheme and host; the whole URL is in the environment."""


def mlflow(
    *,
    uri: Text | None,
    experiment: Text,
    run_name: Text | None,
    log_model: bool | Literal["adapter"],
    system_metrics: bool,
    system_interval_s: Positive,
    tags: dict[str, Any] | None = None,
    notes: Script | None = None,
    also: Name | list[Name] | None = None,
    webhook: Text | None = None,
) -> Tracking:
    """Upload the run to the MLflow server or database ``uri``; null: the embedded database in outputs_dir."""
    return Tracking(
        "mlflow", experiment, run_name, log_model, uri, system_metrics, system_interval_s,
        _named(tags), notes, tuple(_listed(also)), webhook,
    )  # fmt: skip


def check_mlflow(
    *,
    uri: str | None,
    experiment: str,
    run_name: str | None,
    tags: dict[str, Any] | None = None,
    webhook: str | None = None,
    **_: Any,
) -> Iterator[Fault]:
    yield from _name_faults(experiment, run_name)
    yield from _tag_faults(tags)
    if webhook is not None and not (webhook.startswith(("http://", "https://")) and _names_host(webhook)):
        yield Fault("webhook", "is no URL of a web server", "write it as https://host/path; default: RUNNER_WEBHOOK")
    if uri is not None:
        yield from (replace(fault, value=redact(uri)) for fault in _uri_faults(uri))


def offline(
    *,
    experiment: Text,
    run_name: Text | None,
    log_model: bool | Literal["adapter"],
    tags: dict[str, Any] | None = None,
    notes: Script | None = None,
) -> Tracking:
    """Keep the records in the run folder only; ``sync`` can upload them later under these names."""
    return Tracking("offline", experiment, run_name, log_model, tags=_named(tags), notes=notes)


def check_offline(
    *, experiment: str, run_name: str | None, tags: dict[str, Any] | None = None, **_: Any
) -> Iterator[Fault]:
    yield from _name_faults(experiment, run_name)
    yield from _tag_faults(tags)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Check a tracker on this machine, and together with the rest of the configuration."""
    for fault in other_trackers.faults(_listed(cfg["tracking"].get("also")), cfg.get(user_code.PATHS) or ()):
        yield fault.below("tracking")
    if "uri" not in cfg["tracking"] or cfg["tracking"]["uri"] is not None:
        return
    folder = user_path(cfg["outputs_dir"], "outputs_dir").absolute()
    if used := [character for character in NOT_IN_PATH if character in str(folder)]:
        problem = f"MLflow cannot open a database in a folder with {' or '.join(map(repr, used))} in its path"
        remedy = "choose another folder, or set tracking=offline, or tracking.uri to a server"
        yield Fault("outputs_dir", problem, remedy, str(folder))


def store_uri(tracking: Tracking, outputs_dir: str | Path) -> str:
    """URI of the MLflow store of a run: the configured one, else the embedded database in ``outputs_dir``."""
    return tracking.uri or f"sqlite:///{user_path(outputs_dir).absolute() / 'mlflow.db'}"


def _name_faults(experiment: str, run_name: str | None) -> Iterator[Fault]:
    for key, name in (("experiment", experiment), ("run_name", run_name)):
        if name is not None and not 0 < len(name.strip()) <= LONGEST_NAME:
            yield Fault(key, f"must have 1 to {LONGEST_NAME} characters", "choose another name", name)


def _named(tags: Mapping[str, Any] | None) -> dict[str, str]:
    """Name → value of each tag, as texts."""
    return {name: text for name, text in flatten(tags or {}) if name}


def _listed(also: str | Sequence[str] | None) -> list[str]:
    """The trackers, each once."""
    return list(dict.fromkeys([also] if isinstance(also, str) else also or []))


def _tag_faults(tags: Mapping[str, Any] | None) -> Iterator[Fault]:
    for name, text in _named(tags).items():
        if name.startswith(("mlflow.", "runner.")):
            remedy = "choose another name; the description of a run is tracking.notes"
            yield Fault(f"tags.{name}", "is a name that MLflow or runner sets itself", remedy, text)
        elif not TAG.fullmatch(name):
            remedy = f"use at most {LONGEST_NAME} letters, digits, spaces and / . - : _"
            yield Fault(f"tags.{name}", "MLflow admits no tag of this name", remedy, text)
        elif text in ("null", "{}", '""'):
            yield Fault(f"tags.{name}", "has no value", "give it a text, a number, true or false", text)


def _uri_faults(uri: str) -> Iterator[Fault]:
    scheme = uri.partition(":")[0].lower()
    database, _, driver = scheme.partition("+")
    if "://" not in uri or scheme == "file" or (scheme not in ("http", "https") and database not in DRIVERS):
        yield _wrong_store(uri, scheme)
    elif scheme in ("http", "https"):
        if not _names_host(uri):
            yield Fault("uri", "has no host or an invalid port", "write it as http://host:port")
    elif database == "sqlite":
        if not uri.startswith("sqlite:////"):
            remedy = "write an absolute path (four slashes: sqlite:////path/mlflow.db), or leave uri=null"
            yield Fault("uri", "must name a database file by its absolute path", remedy)
        elif any(character in uri for character in NOT_IN_PATH):
            yield Fault("uri", f"must not contain {' or '.join(NOT_IN_PATH)}", "choose another path for the database")
    elif importlib.util.find_spec(driver or DRIVERS[database]) is None:
        remedy = "install it, or use an MLflow server (http://…) that is connected to the database"
        yield Fault("uri", f"needs the package {driver or DRIVERS[database]}, which is not installed", remedy)


def _wrong_store(uri: str, scheme: str) -> Fault:
    if scheme == "file" or uri.startswith((".", "/", "~")) or ":" not in uri:
        problem = "is a folder: MLflow no longer supports file stores"
        return Fault("uri", problem, "leave uri=null (sqlite under outputs_dir), or sqlite:////path/mlflow.db")
    allowed = ["http", "https", *DRIVERS]
    problem = f"is not a URI scheme supported by MLflow. {suggest(scheme, allowed)}".strip(" .")
    remedy = f"http://{uri}" if "://" not in uri else f"use null or one of {', '.join(f'{s}://' for s in allowed)}"
    return Fault("uri", problem, remedy)


def _names_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0 and not any(c.isspace() for c in uri)
    except ValueError:
        return False
