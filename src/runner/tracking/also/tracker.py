"""What a tracker besides MLflow is given, and what it has to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State


@dataclass(frozen=True)
class About:
    """What a tracker shows of a run besides its metrics; without secrets."""

    rundir: RunDir
    identity: str
    """The same for all attempts of the run, and for no other run."""
    project: str
    name: str
    sweep: str | None
    config: Mapping[str, Any]
    overrides: Mapping[str, str]
    """Key → value of the command line."""
    tags: Mapping[str, str]
    notes: str | None


class Tracker(Protocol):
    """A run in a tracker, opened for an attempt of the run. It continues the run that the tracker has already."""

    def log(self, step: int, time_s: float, metrics: Mapping[str, float], /) -> None:
        """Store the metrics of one record; those that the tracker has already are not stored again."""

    def flush(self) -> None:
        """Store what is still in memory."""

    def close(self, state: State | None, /) -> None:
        """Store what is still in memory, and how the run ended; None: it has not ended."""
