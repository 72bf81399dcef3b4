"""Asynchronous successive halving (Li et al. 2018): which of the runs that have come so far go on.

Rungs are at ``min_steps``, ``min_steps × reduction_factor`` and so on. A run that reaches one goes on if it is among
the best ``1 / reduction_factor`` of those that have; else it pauses, and goes on later if it has come to be among them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runner.files import write_atomic
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir

PARTS = {2: "half", 3: "third", 4: "quarter"}
Run = TypeVar("Run", bound=Hashable)
Values = Mapping[int, float]
"""Step → what was measured there."""


@dataclass(frozen=True)
class Rungs:
    """Where runs are compared, and by what."""

    min_steps: int
    reduction_factor: int
    metric: str
    is_larger_better: bool

    def step(self, rung: int) -> int:
        """The step of a rung; they count from 0."""
        return self.min_steps * self.reduction_factor**rung

    def top(self, values: Values) -> int:
        """The highest rung that a run has reached; -1 below the first."""
        rung = -1
        while values and self.step(rung + 1) <= max(values):
            rung += 1
        return rung

    def best(self, rung: int, reached: Mapping[Run, Values], at_least: int = 0) -> list[Run]:
        """The runs that go on from this rung, the best first; ``at_least``: so many, however few have come."""
        step, sign = self.step(rung), -1 if self.is_larger_better else 1

        def cost(run: Run) -> float:
            value = reached[run][step]
            return sign * value if math.isfinite(value) else math.inf

        there = sorted((run for run in reached if step in reached[run]), key=cost)
        return there[: max(at_least, len(there) // self.reduction_factor)]


class Halving:
    """What a search has seen of its runs, and what becomes of them."""

    def __init__(self, rungs: Rungs, runs: list[RunDir]) -> None:
        self.rungs = rungs
        self.reached: dict[Path, dict[int, float]] = {}
        self.paused: set[Path] = set()
        self.has_completed = False
        for rundir in runs:
            self.look(rundir)
            self.ended(rundir, rundir.read_state().status)

    def look(self, rundir: RunDir) -> dict[int, float]:
        """Read what the run's evaluations said; step → value."""
        metric = self.rungs.metric
        said = {each["step"]: each[metric] for each in metrics_log.read(rundir) if each["step"] and metric in each}
        self.reached[rundir.path] = said
        return said

    def ended(self, rundir: RunDir, status: str) -> None:
        self.has_completed |= status == "completed"
        if status == "pruned":
            self.paused.add(rundir.path)

    def top(self, rundir: RunDir) -> int:
        """The highest rung that the run has reached; -1 below the first."""
        return self.rungs.top(self.reached.get(rundir.path, {}))

    def goes_on(self, rundir: RunDir) -> bool:
        """Whether the run goes on from its rung; one that does not is told so."""
        rung = self.top(rundir)
        step = self.rungs.step(rung)
        if rundir.path in self.rungs.best(rung, self.reached) or rundir.read_state().total_steps <= step:
            return True
        if not rundir.prune_request.exists():
            value, best = self.reached[rundir.path][step], PARTS.get(self.rungs.reduction_factor)
            best = best or f"1/{self.rungs.reduction_factor}"
            said = f"{self.rungs.metric} {value:.4g} is not among the best {best} of the runs so far"
            write_atomic(rundir.prune_request, f"paused at step {step}: {said}")
        return False

    def promoted(self, *, is_last: bool) -> tuple[RunDir, int] | None:
        """The paused run that goes on next, and its rung: of the highest rung, the best; None where there is none.

        ``is_last``: no others will come. At least one run comes to its end then.
        """
        at_least = int(is_last and not self.has_completed)
        tops = {path: self.top(RunDir(path)) for path in self.paused}
        for rung in sorted(set(tops.values()) - {-1}, reverse=True):
            # Of those that ended otherwise none will come to its end: they are no reason that nobody else does.
            among = {path: self.reached[path] for path in self.paused} if at_least else self.reached
            for path in self.rungs.best(rung, among, at_least):
                if tops.get(path) == rung:
                    return RunDir(path), rung
        return None

    def resume(self, rundir: RunDir) -> None:
        """Let a run that pauses go on; one that somebody has taken up meanwhile is left to him."""
        self.paused.discard(rundir.path)
        if rundir.read_state().status == "pruned":
            rundir.forget_requests()
            rundir.write_state(status="pending", reason="")
