"""state.json of a run: its status and progress, and how it ended."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from runner.config import bounds
from runner.errors import DamagedError, Fault, quoted
from runner.files import read_json, write_atomic

Status = Literal["pending", "running", "preempted", "completed", "failed", "killed", "pruned"]
DONE: tuple[Status, ...] = ("completed", "pruned")
"""The run has ended for good."""
FINAL: tuple[Status, ...] = (*DONE, "failed", "killed")
"""The run continues only after a request of the user."""
UNFINISHED: tuple[Status, ...] = ("pending", "running", "preempted", "killed")
DIED = "worker killed (SIGKILL or out of memory)"
"""Reason that another process writes to state.json if the worker was killed before it could write its own."""


@dataclass(frozen=True)
class State:
    """Contents of state.json: progress of the run and how it ended."""

    status: Status = "pending"
    step: int = 0
    total_steps: int = 0
    attempt: int = 0
    reason: str = ""
    """Why the run stopped, in one line; empty while it runs and after its last step."""
    pid: int = 0
    host: str = ""
    scheduler_id: str = ""
    started: float = 0.0
    """Start of the first attempt, in seconds since the epoch."""
    updated: float = 0.0
    seconds: float = 0.0
    """Training time of all attempts; the time between attempts is not counted."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Final numbers of the run: metric name → value."""

    @property
    def model_step(self) -> int:
        """The step whose weights are in the folder ``model``: the best one if one was selected, else the last."""
        return int(self.summary.get("best step") or self.step)

    def remaining_s(self) -> float | None:
        """Seconds until the last step, at the average speed so far; None before the first step."""
        if not self.step or not self.seconds:
            return None
        remaining = self.seconds / self.step * (self.total_steps - self.step)
        return max(0.0, remaining - max(0.0, time.time() - self.updated))  # the clock of another machine may be ahead


def read(path: Path, remedy: str) -> State:
    """The state in a file.

    Raises:
        DamagedError: the file is empty, cut off, or has other keys or types; contains ``remedy``.
        FileNotFoundError: there is no such file.
    """
    content = read_json(path, remedy)
    unknown = ", ".join(content.keys() - State.__annotations__.keys())
    wrong = [key for key, kind in _kinds().items() if key in content and not bounds.fits(content[key], kind)]
    if unknown or content.get("status") not in get_args(Status) or wrong:
        what = f"unknown keys: {unknown}" if unknown else f"unknown status {content.get('status')!r}"
        what = f"{wrong[0]} is {quoted(content[wrong[0]])}" if wrong and wrong != ["status"] else what
        raise DamagedError(Fault("", f"{path} is damaged: {what}", remedy))
    return State(**content)


def write(path: Path, state: State) -> State:
    """Write the state, atomically, with the time of this change; returns it."""
    state = replace(state, updated=time.time())
    write_atomic(path, json.dumps(asdict(state), indent=1))
    return state


@functools.cache
def _kinds() -> dict[str, Any]:
    """Field of ``State`` → its type."""
    return get_type_hints(State)
