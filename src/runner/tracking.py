"""What is recorded of a run: first lines in its folder, which are the truth; MLflow mirrors the folder.

The process that trains writes metrics.jsonl and nothing else: no tracker can slow it down, stop it or lose its records.
``python -m runner.mirror FOLDER``, a child that outlives it, brings the folder into MLflow.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from runner.config import bind
from runner.errors import Fault, suggest
from runner.files import write_atomic
from runner.rundir import RunDir
from runner.schema import Positive
from runner.secrets import redact

log = logging.getLogger("runner")

Record = dict[str, Any]
"""{"step": int, "time": seconds since the epoch, metric name: float, …}"""

DRIVERS = {"sqlite": "sqlite3", "postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}
"""The databases that MLflow can use, with the module that SQLAlchemy needs for each unless the URI names another."""

LOSS, BEST, SECONDS, TOKENS = "eval/loss", "eval/best_loss", "train/seconds", "train/tokens"
"""The loss at the end and the smallest there was, the seconds of training of all attempts, the tokens seen."""

LONGEST_NAME = 250


@dataclass(frozen=True)
class Tracking:
    """Where the records of a run are shown, besides its folder."""

    kind: Literal["mlflow", "offline"]
    experiment: str
    run_name: str | None
    log_model: bool | Literal["adapter"]
    uri: str | None = None
    system_metrics: bool = False
    system_interval_s: float = 10.0


def mlflow(
    *,
    uri: str | None,
    experiment: str,
    run_name: str | None,
    log_model: bool | Literal["adapter"],
    system_metrics: bool,
    system_interval_s: Positive,
) -> Tracking:
    """Mirror the run into MLflow: the embedded database where ``uri`` is null, else that server or database."""
    return Tracking("mlflow", experiment, run_name, log_model, uri, system_metrics, system_interval_s)


def check_mlflow(*, uri: str | None, experiment: str, run_name: str | None, **_: Any) -> Iterator[Fault]:
    yield from _name_faults(experiment, run_name)
    if uri is not None:
        yield from (replace(fault, value=redact(uri)) for fault in _uri_faults(uri))


def offline(*, experiment: str, run_name: str | None, log_model: bool | Literal["adapter"]) -> Tracking:
    """Keep the records in the run folder alone; the names are those that ``sync`` uses later."""
    return Tracking("offline", experiment, run_name, log_model)


def check_offline(*, experiment: str, run_name: str | None, **_: Any) -> Iterator[Fault]:
    yield from _name_faults(experiment, run_name)


def store_uri(tracking: Tracking, outputs_dir: str | Path) -> str:
    """The URI of the MLflow store of a run: the one it names, else the database embedded in ``outputs_dir``."""
    return tracking.uri or f"sqlite:///{Path(outputs_dir).expanduser().absolute() / 'mlflow.db'}"


def append(rundir: RunDir, record: Mapping[str, Any]) -> None:
    """Add one record to metrics.jsonl; once this returns, a kill -9 of this process no longer loses it.

    Raises:
        OSError: no space left; nothing of the record is in the file then.
    """
    append_to(rundir.metrics, record)


def append_to(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record to a .jsonl file, whole or not at all."""
    line = (json.dumps(_written(record), allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if (written := os.write(handle, line)) < len(line):  # a disk that is full takes a part
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))
    finally:
        os.close(handle)


def sync_to_disk(rundir: RunDir) -> None:
    """Make the records survive a power cut: called when a checkpoint is saved."""
    if rundir.metrics.exists():
        with rundir.metrics.open("rb") as handle:
            os.fsync(handle.fileno())


def rewind(rundir: RunDir, step: int, evaluated: bool = True) -> int:
    """Cut the records back to a checkpoint, from which they are written anew; returns how many were cut.

    Keeps every whole record up to ``step``; of those at ``step`` itself the evaluation only if it is ``evaluated``.
    """
    if not rundir.metrics.exists():
        return 0
    content = rundir.metrics.read_bytes()
    records = read(rundir)
    kept = [r for r in records if r["step"] < step or (r["step"] == step and (evaluated or not _is_evaluation(r)))]
    text = "".join(json.dumps(_written(record), allow_nan=False) + "\n" for record in kept).encode()
    if text != content:
        write_atomic(rundir.metrics, text)
    return len(records) - len(kept)


def read(rundir: RunDir) -> list[Record]:
    """All records of the run; a last line that was cut short by a crash is left out."""
    return tail(rundir.metrics, 0)[0]


def read_evaluations(rundir: RunDir) -> list[Record]:
    """What ``evaluate`` has found of the run: {time, step, name, metrics: {…}, …}, oldest first."""
    if not rundir.evaluations.exists():
        return []
    found = []
    for line in rundir.evaluations.read_text().splitlines():
        try:
            record = json.loads(line)
            metrics = {str(name): float(value) for name, value in record["metrics"].items()}
            found.append({**record, "step": int(record["step"]), "time": float(record["time"]), "metrics": metrics})
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning(f"{rundir.evaluations}: left out a line that is no record: {line[:80]!r}")
    return found


def last_values(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric, and the best of the evaluations after training began."""
    found: dict[str, float] = {}
    best = math.inf
    for record in records:
        found.update({name: value for name, value in record.items() if name not in ("step", "time")})
        if record["step"] > 0 and math.isfinite(loss := record.get(LOSS, math.inf)):
            best = min(best, loss)
    if math.isfinite(best):
        found[BEST] = best
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def tail(path: Path, offset: int) -> tuple[list[Record], int]:
    """The records of a .jsonl file from byte ``offset`` on, and the offset after the last whole line."""
    if not path.exists():
        return [], 0
    with path.open("rb") as handle:
        handle.seek(offset)
        whole, newline, _ = handle.read().rpartition(b"\n")
    return list(_records(whole.splitlines(), path)), offset + len(whole) + len(newline)


def start_mirror(rundir: RunDir, cfg: Mapping[str, Any]) -> subprocess.Popen[bytes] | None:
    """Start the process that mirrors ``rundir`` into MLflow; None with ``tracking=offline``.

    It runs in a session of its own, so that neither Ctrl-C nor the end of this process takes it along, and knows by
    the time stamp it is given which state of the run is old.
    """
    if bind(cfg["tracking"], "tracking")().kind == "offline":
        return None
    command = [sys.executable, "-P", "-m", "runner.mirror", str(rundir.path), str(rundir.read_state().updated)]
    return mirror_process(command, rundir.mirror_log)


def mirror_process(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that mirrors, by itself: it outlives this one, and Ctrl-C does not reach it."""
    # One thread is plenty for what waits; and no telemetry, whatever the shell says.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **quiet},
        )


@dataclass(frozen=True)
class MirrorResult:
    """How far MLflow got."""

    url: str | None
    """The page of the run, on a server."""
    unsent: int
    """Records that MLflow does not have."""
    message: str
    """How to look at the run, or why MLflow has not got it all; ``python -m runner sync`` brings the rest."""


def wait_mirror(proc: subprocess.Popen[bytes] | None, rundir: RunDir, timeout_s: float = 60.0) -> MirrorResult:
    """Wait until the mirror has told MLflow all of it, has given up, or has taken too long."""
    if proc is None:
        return MirrorResult(None, len(read(rundir)), "tracking=offline")
    try:
        code: int | None = proc.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    noted, said = rundir.read_manifest().get("mlflow") or {}, read_report(rundir)
    url = noted.get("url")
    # A mirror that was killed has sent more than it last wrote down: better to say too many than too few.
    unsent = 0 if code == 0 else max(0, len(read(rundir)) - int(said.get("sent", 0)))
    if code == 0:
        return MirrorResult(url, unsent, url or (f"mlflow ui --backend-store-uri {noted['uri']}" if noted else ""))
    if code is None:
        return MirrorResult(url, unsent, f"process {proc.pid} is still telling MLflow, see {rundir.mirror_log}")
    problem = said.get("problem") or f"the mirror ended with code {code}, see {rundir.mirror_log}"
    return MirrorResult(url, unsent, problem)


def read_report(rundir: RunDir) -> dict[str, Any]:
    """What the mirror last wrote of itself: {sent, unsent, problem}; empty before it wrote anything."""
    return dict(json.loads(rundir.mirror_report.read_text())) if rundir.mirror_report.exists() else {}


def _written(record: Mapping[str, Any]) -> Record:
    # JSON knows no NaN and no infinities: they are written as words, which float() reads back.
    inner = {k: _written(v) if isinstance(v, Mapping) else v for k, v in record.items()}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in inner.items()}


def _records(lines: Iterable[bytes], path: Path) -> Iterator[Record]:
    for line in lines:
        try:
            record = json.loads(line)
            yield {k: float(v) if isinstance(v, str) else v for k, v in record.items()} | {"step": int(record["step"])}
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning(f"{path}: left out a line that is no record: {line[:80]!r}")


def _is_evaluation(record: Record) -> bool:
    return any(name.startswith("eval/") for name in record)


def _name_faults(experiment: str, run_name: str | None) -> Iterator[Fault]:
    for key, name in (("experiment", experiment), ("run_name", run_name)):
        if name is not None and not 0 < len(name.strip()) <= LONGEST_NAME:
            yield Fault(key, f"must have 1 to {LONGEST_NAME} characters", "give it a shorter or a longer name", name)


def _uri_faults(uri: str) -> Iterator[Fault]:
    scheme = uri.partition(":")[0].lower()
    database, _, driver = scheme.partition("+")
    if "://" not in uri or scheme == "file" or (scheme not in ("http", "https") and database not in DRIVERS):
        yield _wrong_store(uri, scheme)
    elif scheme in ("http", "https"):
        if not _names_host(uri):
            yield Fault("uri", "names no host, or no valid port", "write it as http://host:port")
    elif database == "sqlite":
        if not uri.startswith("sqlite:////"):
            remedy = "write an absolute path (four slashes: sqlite:////path/mlflow.db), or leave uri=null"
            yield Fault("uri", "must name a database file by its absolute path", remedy)
    elif importlib.util.find_spec(driver or DRIVERS[database]) is None:
        remedy = "install it, or use an MLflow server (http://…) in front of the database"
        yield Fault("uri", f"needs the package {driver or DRIVERS[database]}, which is not installed", remedy)


def _wrong_store(uri: str, scheme: str) -> Fault:
    if scheme == "file" or uri.startswith((".", "/", "~")) or ":" not in uri:
        problem = "is a folder of files, which MLflow no longer supports as a store"
        return Fault("uri", problem, "leave uri=null (sqlite under outputs_dir), or sqlite:////path/mlflow.db")
    allowed = ["http", "https", *DRIVERS]
    problem = f"has no scheme that MLflow can be reached by. {suggest(scheme, allowed)}".strip()
    remedy = f"http://{uri}" if "://" not in uri else f"use null or one of {', '.join(f'{s}://' for s in allowed)}"
    return Fault("uri", problem, remedy)


def _names_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0 and not any(c.isspace() for c in uri)
    except ValueError:
        return False
