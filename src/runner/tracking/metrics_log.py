"""``metrics.jsonl`` of a run folder: append, read, and cut back to a checkpoint."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.files import write_atomic
from runner.tracking.rundir import RunDir

log = logging.getLogger("runner")


Record = dict[str, Any]
"""{"step": int, "time": seconds since the epoch, metric name: float, …}"""


LOSS, BEST, SECONDS, TOKENS = "eval/loss", "eval/best_loss", "train/seconds", "train/tokens"
"""The loss at the end and the smallest there was, the seconds of training of all attempts, the tokens seen."""


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
