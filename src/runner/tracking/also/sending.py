"""Send the records of a run folder to its trackers besides MLflow."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.config import user_code, user_function
from runner.errors import typed_line
from runner.secrets import redact, redact_tree
from runner.tracking import naming
from runner.tracking.also.tensorboard import TensorBoard
from runner.tracking.also.tracker import About, Tracker
from runner.tracking.also.trackio import Trackio
from runner.tracking.also.wandb import WeightsAndBiases
from runner.tracking.metrics_log import tail
from runner.tracking.other_trackers import KEY, is_own
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import FINAL, State
from runner.tracking.trackers import Tracking

TRACKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Between two batches; after failures, up to the longest."""


@dataclass
class _Destination:
    tracker: Tracker | None = None
    inode: int = 0
    offset: int = 0
    """Bytes of metrics.jsonl that the tracker has got."""
    due: float = 0.0
    failures: int = 0
    tried: tuple[int, str] | None = None
    """Attempt and status of the end that was sent last, with or without success."""
    has_end: bool = False
    """Whether the tracker has got this end."""


class Sending:
    """Sends the records of one run to each tracker of ``tracking.also``. A tracker that fails disturbs nothing else."""

    def __init__(self, rundir: RunDir, tracking: Tracking, config: Mapping[str, Any], problems: dict[str, str]) -> None:
        """``problems``: tracker → its last error message, empty on success; changed here."""
        self._rundir, self._tracking, self._problems = rundir, tracking, problems
        self._config, self._code = user_code.detached(config), tuple(config.get(user_code.PATHS) or ())
        self._destinations = {name: _Destination() for name in tracking.also}

    def send(self, state: State) -> list[str]:
        """Send what is new, at once if the run has ended; returns a line for each that fails, or works again."""
        lines = []
        end = (state.attempt, state.status) if state.status in (*FINAL, "preempted") else None
        for name, each in self._destinations.items():
            is_new_end = end is not None and end != each.tried
            if not is_new_end and ((end and each.has_end) or time.monotonic() < each.due):
                continue
            problem = self._problem(name, each, state if end else None)
            each.tried, each.has_end = end, bool(end) and not problem
            each.failures = each.failures + 1 if problem else 0
            each.due = time.monotonic() + min(PAUSE_S * 2**each.failures, LONGEST_PAUSE_S)
            if problem != self._problems.get(name, ""):
                lines.append(f"{name}: {problem or 'works again'}")
            self._problems[name] = problem
        return lines

    def close(self) -> None:
        """Close the trackers of a run that has not ended."""
        for each in self._destinations.values():
            _close(each)

    def _problem(self, name: str, each: _Destination, ended: State | None) -> str:
        try:
            self._send(name, each, ended)
        except Exception as error:  # whatever the library raises: MLflow and the run go on
            _close(each)
            return redact(typed_line(error))
        if ended:
            each.tracker = None
        return ""

    def _send(self, name: str, each: _Destination, ended: State | None) -> None:
        if self._is_cut(each):
            _close(each)
        tracker = each.tracker
        if tracker is None:
            make = user_function.load(KEY, name, self._code) if is_own(name) else TRACKERS[name]
            tracker = each.tracker = make(self._about())
            each.offset = 0
        with contextlib.suppress(FileNotFoundError):
            each.inode = self._rundir.metrics.stat().st_ino
        records, each.offset = tail(self._rundir.metrics, each.offset)
        for record in records:
            metrics = {key: float(value) for key, value in record.items() if key not in ("step", "time")}
            tracker.log(record["step"], record["time"], metrics)
        if ended:
            tracker.close(ended)
        else:
            tracker.flush()

    def _is_cut(self, each: _Destination) -> bool:
        """Whether a resumed run has cut metrics.jsonl back to its checkpoint, which replaces the file."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._rundir.metrics)
            return bool(each.inode) and (found.st_ino != each.inode or found.st_size < each.offset)
        return each.offset > 0

    def _about(self) -> About:
        manifest, tracking = self._rundir.read_manifest(), self._tracking
        return About(
            rundir=self._rundir,
            identity=str(manifest.get("id") or self._rundir.path.name),
            project=tracking.experiment,
            name=tracking.run_name or naming.short_name(manifest) or self._rundir.path.name,
            sweep=manifest.get("sweep"),
            config=redact_tree(self._config),
            overrides=dict(_pairs(manifest.get("overrides") or [])),
            tags=tracking.tags,
            notes=tracking.notes,
        )


def _close(each: _Destination) -> None:
    tracker, each.tracker = each.tracker, None
    with contextlib.suppress(Exception):
        if tracker:
            tracker.close(None)


def _pairs(overrides: list[Any]) -> Iterator[tuple[str, str]]:
    for word in map(str, overrides):
        key, equals, value = word.partition("=")
        if equals:
            yield key.lstrip("+"), value
