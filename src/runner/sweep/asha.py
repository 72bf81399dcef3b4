"""Asynchronous successive halving (ASHA, Li et al. 2018): which runs continue at a rung, and which pause.

Rungs are at steps ``min_steps``, ``min_steps × reduction_factor`` and so on. A run that reaches a rung continues if it
is among the best ``1 / reduction_factor`` of all runs that have reached the rung; otherwise it pauses. A paused run is
resumed if it is among the best when more runs have reached the rung.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runner.files import write_atomic
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir

log = logging.getLogger("runner")
PARTS = {2: "half", 3: "third", 4: "quarter"}
Run = TypeVar("Run", bound=Hashable)
Values = Mapping[int, float]
"""Step → value of the objective."""


@dataclass(frozen=True)
class Rungs:
    """The steps at which runs are compared, and the metric."""

    min_steps: int
    reduction_factor: int
    metric: str
    is_larger_better: bool

    def step(self, rung: int) -> int:
        """The step of a rung; rung 0 is the first."""
        return self.min_steps * self.reduction_factor**rung

    def top(self, values: Values) -> int:
        """The highest rung that these values have reached; -1 below the first."""
        rung = -1
        while values and self.step(rung + 1) <= max(values):
            rung += 1
        return rung

    def best(self, rung: int, reached: Mapping[Run, Values], at_least: int = 0) -> list[Run]:
        """The runs that continue from this rung, the best first; never fewer than ``at_least``. NaN is worst."""
        step, sign = self.step(rung), -1 if self.is_larger_better else 1

        def cost(run: Run) -> float:
            value = reached[run][step]
            return sign * value if math.isfinite(value) else math.inf

        runs = sorted((run for run in reached if step in reached[run]), key=cost)
        return runs[: max(at_least, len(runs) // self.reduction_factor)]


class Halving:
    """State of the halving: the evaluations of all runs of a search, and which runs are paused."""

    def __init__(self, rungs: Rungs, runs: list[RunDir]) -> None:
        self.rungs = rungs
        self.reached: dict[Path, dict[int, float]] = {}
        self.paused: set[Path] = set()
        self.has_completed = False
        for rundir in runs:
            self.read(rundir)
            self.ended(rundir, rundir.read_state().status)

    def read(self, rundir: RunDir) -> dict[int, float]:
        """Read the run's evaluations; returns step → value. A run that has lost the value of a rung is not compared."""
        metric = self.rungs.metric
        values = {each["step"]: each[metric] for each in metrics_log.read(rundir) if each["step"] and metric in each}
        steps = map(self.rungs.step, range(self.rungs.top(values) + 1))
        if lost := [step for step in steps if step not in values]:
            if self.reached.get(rundir.path, values):
                log.warning(
                    f"{rundir.metrics}: {metric} of step {lost[0]} is lost; the run is not compared with others"
                )
            values = {}
        self.reached[rundir.path] = values
        return values

    def ended(self, rundir: RunDir, status: str) -> None:
        self.has_completed |= status == "completed"
        if status == "pruned":
            self.paused.add(rundir.path)

    def top(self, rundir: RunDir) -> int:
        """The highest rung that the run has reached; -1 below the first."""
        return self.rungs.top(self.reached.get(rundir.path, {}))

    def continues(self, rundir: RunDir) -> bool:
        """Whether the run continues from its rung; otherwise a request to pause is written to its folder."""
        rung = self.top(rundir)
        step = self.rungs.step(rung)
        if rundir.path in self.rungs.best(rung, self.reached) or rundir.read_state().total_steps <= step:
            return True
        if not rundir.prune_request.exists():
            value, factor = self.reached[rundir.path][step], self.rungs.reduction_factor
            reason = f"{self.rungs.metric} {value:.4g} is not among the best {PARTS.get(factor, f'1/{factor}')}"
            write_atomic(rundir.prune_request, f"paused at step {step}: {reason} of the runs so far")
        return False

    def promoted(self, *, is_last: bool) -> tuple[RunDir, int] | None:
        """The paused run to resume next, and its rung: the best one of the highest rung. None if all stay paused.

        ``is_last``: no more runs will be proposed; then at least one run of the search is trained to its end.
        """
        at_least = int(is_last and not self.has_completed)
        tops = {path: self.top(RunDir(path)) for path in self.paused}
        for rung in sorted(set(tops.values()) - {-1}, reverse=True):
            # With at_least=1, rank only paused runs: failed ones cannot be resumed.
            ranked = {path: self.reached[path] for path in self.paused} if at_least else self.reached
            for path in self.rungs.best(rung, ranked, at_least):
                if tops.get(path) == rung:
                    return RunDir(path), rung
        return None

    def resume(self, rundir: RunDir) -> None:
        """Set a paused run to ``pending``; a run that another process has resumed meanwhile is not changed."""
        self.paused.discard(rundir.path)
        if rundir.read_state().status == "pruned":
            rundir.forget_requests()
            rundir.write_state(status="pending", reason="")
