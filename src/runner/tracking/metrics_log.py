"""Append to metrics.jsonl of a run folder, read it, and truncate it to the step of a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.files import write_atomic
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State

log = logging.getLogger("runner")

Record = dict[str, Any]
"""{"step": int, "time": seconds since the epoch, metric name: float, …}"""

TAIL_BYTES = 65536
BEFORE = " before"
"""Ending of a key of the summary: the value before training."""
LOSS, BEST, SECONDS, TOKENS = "eval/loss", "eval/best_loss", "train/seconds", "train/tokens"
"""Metric names: eval loss, smallest eval loss so far, training seconds of all attempts, tokens seen."""


def append(rundir: RunDir, record: Mapping[str, Any]) -> None:
    """Append one record to metrics.jsonl; after this returns, a kill -9 of this process does not lose it.

    Raises:
        OSError: no space left; the file is unchanged.
    """
    append_to(rundir.metrics, record)


def append_to(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a .jsonl file, completely or not at all."""
    line = (json.dumps(_without_nan(record), allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if (written := os.write(handle, line)) < len(line):  # a full disk may accept a part of the line
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))
    finally:
        os.close(handle)


def sync_to_disk(rundir: RunDir) -> None:
    """fsync metrics.jsonl, so that it survives a power failure: called when a checkpoint is saved."""
    if rundir.metrics.exists():
        with rundir.metrics.open("rb") as handle:
            os.fsync(handle.fileno())


def recent(rundir: RunDir) -> list[Record]:
    """The last records, some hundreds; reads only the end of the file."""
    with contextlib.suppress(OSError), rundir.metrics.open("rb") as handle:
        start = max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES)
        handle.seek(start)
        lines = handle.read().rpartition(b"\n")[0].splitlines()
        return list(_records(lines[1:] if start else lines, rundir.metrics))
    return []


def last_of(rundir: RunDir, *names: str) -> tuple[str, float] | None:
    """(name, value) of the first of these metrics in the last record that has one; reads only the end of the file."""
    with contextlib.suppress(OSError), rundir.metrics.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in reversed(handle.read().splitlines()):
            with contextlib.suppress(ValueError, TypeError, StopIteration):  # a line that is cut off
                record = json.loads(line)
                name = next(name for name in names if name in record)
                return name, float(record[name])
    return None


def rewind(rundir: RunDir, step: int, evaluated: bool = True) -> int:
    """Remove the records after the checkpoint of ``step``, as training repeats those steps; returns how many.

    ``evaluated``: keep also the eval record at ``step`` itself.
    """
    if not rundir.metrics.exists():
        return 0
    content = rundir.metrics.read_bytes()
    records = read(rundir)
    kept = [r for r in records if r["step"] < step or (r["step"] == step and (evaluated or not _is_evaluation(r)))]
    text = "".join(json.dumps(_without_nan(record), allow_nan=False) + "\n" for record in kept).encode()
    if text != content:
        write_atomic(rundir.metrics, text)
    return len(records) - len(kept)


def read(rundir: RunDir) -> list[Record]:
    """All records of the run, without an incomplete last line after a crash."""
    return tail(rundir.metrics, 0)[0]


def lost(records: Iterable[Record], train: Mapping[str, Any], step: int, total: int, *, evaluated: bool) -> str:
    """What is missing in the records of a run up to ``step``, as a reason; empty if they are complete.

    Args:
        train: the config group ``train``, which decides at which steps a record is due.
        total: the last step of the run.
        evaluated: whether the evaluation at ``step`` itself has been recorded, if one is due.
    """
    logging_steps, eval_steps = train.get("logging_steps"), train.get("eval_steps")
    if not step or not logging_steps or "eval_steps" not in train:
        return ""
    records = list(records)
    ends = {total} if step == total else set()
    training = set(range(logging_steps, step + 1, logging_steps)) | ends
    evaluations = {0, *(range(eval_steps, step + 1, eval_steps) if eval_steps else ()), *ends}
    evaluations -= set() if evaluated else {step}
    missing = sorted(training - {each["step"] for each in records if "train/learning_rate" in each})
    missing += sorted(evaluations - {each["step"] for each in records if _is_evaluation(each)})
    if not missing:
        return ""
    count = f"{len(missing)} of {len(training) + len(evaluations)} records"
    return f"metrics.jsonl is incomplete: {count} up to step {step} are missing (of step {_few(sorted(set(missing)))})"


def lost_of(state: State, records: Iterable[Record], config: Mapping[str, Any]) -> str:
    """``lost`` for a run with this state."""
    train, is_done = config.get("train"), state.status == "completed"
    train = train if isinstance(train, Mapping) else {}
    return lost(records, train, state.step, state.total_steps, evaluated=is_done)


def _few(steps: list[int], shown: int = 5) -> str:
    return ", ".join(map(str, steps[:shown])) + (", …" if len(steps) > shown else "")


def read_evaluations(rundir: RunDir) -> list[Record]:
    """Results of the command ``evaluate``: {time, step, name, metrics: {…}, …}, oldest first."""
    if not rundir.evaluations.exists():
        return []
    records = []
    for line in rundir.evaluations.read_text().splitlines():
        try:
            record = json.loads(line)
            metrics = {str(name): float(value) for name, value in record["metrics"].items()}
            records.append({**record, "step": int(record["step"]), "time": float(record["time"]), "metrics": metrics})
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning(f"{rundir.evaluations}: skipped an invalid line: {line[:80]!r}")
    return records


def last_values(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Last finite value of each metric, and the smallest eval loss after step 0 as ``BEST``."""
    values: dict[str, float] = {}
    best = math.inf
    for record in records:
        values.update({name: value for name, value in record.items() if name not in ("step", "time")})
        if record["step"] > 0 and math.isfinite(loss := record.get(LOSS, math.inf)):
            best = min(best, loss)
    if math.isfinite(best):
        values[BEST] = best
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def of_model(state: State, records: Iterable[Record]) -> dict[str, float]:
    """The evaluation of the weights in the folder ``model``: metric → value; empty if those are the last weights."""
    if state.model_step == state.step:
        return {}
    evaluations = (record for record in records if record["step"] == state.model_step)
    return {name: value for each in evaluations for name, value in each.items() if name.startswith("eval/")}


def of_run(
    state: State, records: Sequence[Record], config: Mapping[str, Any], later: Sequence[Record] = ()
) -> tuple[dict[str, float], str]:
    """The finite values of a run (the last of each metric, those of ``evaluate``, and ``BEST``), and what is lost.

    Evaluations are those of the weights in the folder ``model``. If records are lost, the values are those of the
    summary and of ``evaluate`` (``later``) only.
    """
    if problem := lost_of(state, records, config):
        summary = {name: value for name, value in state.summary.items() if "/" in name and not name.endswith(BEFORE)}
        values = last_values([{**summary, "step": 0}, *later])
    else:
        values = last_values([*records, {"step": state.model_step, **of_model(state, records)}, *later])
    return values | ({SECONDS: state.seconds} if state.seconds else {}), problem


def before_and_after(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Metric → its value before and after training, from the summary of a run: the loss, and what its task chose."""
    names = [key.removesuffix(BEFORE) for key in summary if key.endswith(BEFORE)]
    pairs: dict[str, Any] = {name: (summary[name + BEFORE], summary.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if all(isinstance(value, int | float) for value in pair)}


def tail(path: Path, offset: int) -> tuple[list[Record], int]:
    """Records of a .jsonl file after byte ``offset``, and the offset after the last complete line."""
    if not path.exists():
        return [], 0
    with path.open("rb") as handle:
        handle.seek(offset)
        complete, newline, _ = handle.read().rpartition(b"\n")
    return list(_records(complete.splitlines(), path)), offset + len(complete) + len(newline)


def _without_nan(record: Mapping[str, Any]) -> Record:
    # JSON has no NaN and no infinity: they are written as strings, which float() reads back.
    inner = {k: _without_nan(v) if isinstance(v, Mapping) else v for k, v in record.items()}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in inner.items()}


def _records(lines: Sequence[bytes], path: Path) -> Iterator[Record]:
    whole: Sequence[Any] = []
    with contextlib.suppress(ValueError):  # a line is damaged: find it
        whole = json.loads(b"[%s]" % b",".join(lines))
    is_whole = len(whole) == len(lines)
    for number, line in enumerate(lines):
        try:
            record = whole[number] if is_whole else json.loads(line)
            yield {k: float(v) if isinstance(v, str) else v for k, v in record.items()} | {"step": int(record["step"])}
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning(f"{path}: skipped an invalid line: {line[:80]!r}")


def _is_evaluation(record: Record) -> bool:
    return any(name.startswith("eval/") for name in record)
