"""What to try next: which parameter's range is still improving, which differences are chance, and how sure that is.

Runs are compared in pairs that differ in one parameter only (paired t-test), else by their means (Welch's t-test). As
the values to compare are chosen after looking at the results, p is multiplied by the number of possible choices
(Bonferroni).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from runner.report import columns, ranking, statistics
from runner.report.columns import Goal
from runner.report.ranking import BINS, LEVELS, SIGNIFICANT
from runner.report.results import Result
from runner.tracking.metrics_log import LOSS

Kind = Literal["improving", "inside", "better", "unsure", "chance"]
ORDER: tuple[Kind, ...] = ("improving", "inside", "better", "unsure", "chance")
FEWEST = 3
"""Number of pairs, or of runs of each value, from which on they are tested: two can agree by chance."""
REPEATED = "seed"
"""The parameter that repeats a setting: nothing to choose."""


@dataclass(frozen=True)
class Advice:
    """One sentence about a parameter."""

    parameter: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.parameter}: {self.text}"


@dataclass(frozen=True)
class _Class:
    """The runs with one value of a parameter, or with values of one interval."""

    name: str
    results: list[Result]
    numbers: list[float]
    """The values as numbers; empty if one is text."""


@dataclass(frozen=True)
class _Test:
    """A comparison of two classes."""

    better: float
    """The mean of the first is better by this much; in the unit of the metric."""
    p: float | None
    """None: too few runs."""
    pairs: int
    """Number of pairs of runs that differ only in the parameter; 0 if there are none, and means were compared."""

    @property
    def is_sure(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANT

    @property
    def found(self) -> str:
        """``p = 0.003, 6 pairs of runs``"""
        p = f"p = {max(self.p, 1e-6):.2g}" if self.p is not None else ""
        return f"{p}, {self.pairs} pairs of runs" if self.pairs else p

    def said(self) -> str:
        if self.p is None:
            few = "one run each" if self.pairs < 2 else f"only {self.pairs} pairs of runs"
            return f"{few}: repeat with seed=1,2,3 to be sure"
        return f"sure: {self.found}" if self.is_sure else f"may be chance: {self.found}"


def of(results: Sequence[Result], params: Sequence[str], goal: Goal, over: str = "") -> list[Advice]:
    """A sentence for each parameter with two values or more among the completed runs; those to act on first.

    Args:
        params: the parameters that differ between the runs; none of them is judged by a loss that it is part of.
        over: the parameter that repeats a setting, besides the seed.
    """
    rated = [result for result in results if result.is_completed and math.isfinite(goal.cost(result))]
    of_loss = ranking.of_loss(results, params) if goal.key == LOSS else []
    found = [
        _of_parameter(rated, key, [other for other in params if other != key], goal)
        for key in params
        if key not in (over, *of_loss) and key.rpartition(".")[2] != REPEATED
    ]
    return sorted((each for each in found if each), key=lambda each: ORDER.index(each.kind))


def _of_parameter(rated: Sequence[Result], key: str, others: Sequence[str], goal: Goal) -> Advice | None:
    classes = _classes(rated, key)
    if len(classes) < 2:
        return None
    cost = {each.name: fmean(map(goal.cost, each.results)) for each in classes}
    ranked = sorted(classes, key=lambda each: cost[each.name])
    best, worst = ranked[0], ranked[-1]
    choices = len(classes) * (len(classes) - 1) // 2
    whole = _compared(best, worst, others, goal, choices)
    if columns.shown(goal.key, abs(whole.better)) == 0:
        return Advice(key, "chance", f"{best.name} and {worst.name} are equal in the digits shown")
    if whole.p is not None and not whole.is_sure:
        text = f"no difference beyond chance between {best.name} and {worst.name} ({whole.found})"
        return Advice(key, "chance", text)
    if all(each.numbers for each in classes):
        return _of_numbers(key, classes, best, others, goal)
    second = _compared(best, ranked[1], others, goal, len(classes) - 1)
    text = f"{best.name} is better than {ranked[1].name} by {columns.text(goal.key, second.better)} ({second.said()})"
    return Advice(key, "better" if second.is_sure else "unsure", text)


def _of_numbers(key: str, classes: list[_Class], best: _Class, others: Sequence[str], goal: Goal) -> Advice:
    """Whether the metric still improves towards an end of the range; ``classes`` from small to large values."""
    place, metric = classes.index(best), columns.title(goal.key)
    near = [classes[n] for n in (place - 1, place + 1) if 0 <= n < len(classes)]
    tests = [_compared(best, each, others, goal, len(classes) - 1) for each in near]
    weakest = max(tests, key=lambda test: 2.0 if test.p is None else test.p)
    if len(near) == 2:
        text = f"the best value, {best.name}, is inside the range, between {near[0].name} and {near[1].name}"
        return Advice(key, "inside" if weakest.is_sure else "unsure", f"{text} ({weakest.said()})")
    moves = "rises" if goal.is_larger_better else "falls"
    end = "smallest" if place == 0 else "largest"
    beyond = _beyond([number for each in classes for number in each.numbers], is_upwards=place > 0)
    text = f"{metric} still {moves} towards the {end} value: {best.name} is better than {near[0].name} by "
    text += f"{columns.text(goal.key, weakest.better)} ({weakest.said()})"
    text += f"; try {key}={beyond}" if beyond else ""
    return Advice(key, "improving" if weakest.is_sure else "unsure", text)


def _classes(rated: Sequence[Result], key: str) -> list[_Class]:
    """The runs by their value; numbers with many values in BINS intervals of about as many runs, in order."""
    members: dict[str, list[Result]] = defaultdict(list)
    for result in rated:
        if (value := columns.value(result, key)) is not None:
            members[columns.text(key, value)].append(result)
    numbers = {name: columns.number(columns.value(runs[0], key)) for name, runs in members.items()}
    known = {name: number for name, number in numbers.items() if number is not None}
    if len(known) < len(numbers):
        return [_Class(name, runs, []) for name, runs in members.items()]
    names = sorted(known, key=lambda name: known[name])
    if len(names) < LEVELS:
        return [_Class(name, members[name], [known[name]]) for name in names]
    cuts = [round(n * len(names) / BINS) for n in range(BINS + 1)]
    return [
        _Class(
            f"{names[start]} to {names[end - 1]}" if end - start > 1 else names[start],
            [result for name in names[start:end] for result in members[name]],
            [known[name] for name in names[start:end]],
        )
        for start, end in pairwise(cuts)
    ]


def _compared(one: _Class, other: _Class, others: Sequence[str], goal: Goal, choices: int) -> _Test:
    costs = [[goal.cost(result) for result in each.results] for each in (one, other)]
    differences = list(_differences(one, other, others, goal))
    if len(differences) < FEWEST <= min(map(len, costs)):  # a search: hardly two runs differ in one parameter only
        p, pairs, better = statistics.welch(*costs), 0, fmean(costs[1]) - fmean(costs[0])
    else:
        p = statistics.paired(differences) if len(differences) >= FEWEST else None
        pairs, better = len(differences), fmean(differences or [fmean(costs[1]) - fmean(costs[0])])
    return _Test(better, None if p is None else min(1.0, p * choices), pairs)


def _differences(one: _Class, other: _Class, others: Sequence[str], goal: Goal) -> Iterator[float]:
    """Cost in ``other`` minus cost in ``one`` for each setting of the other parameters that both have."""
    costs: list[dict[tuple[object, ...], list[float]]] = [defaultdict(list), defaultdict(list)]
    for of_class, each in zip(costs, (one, other), strict=True):
        for result in each.results:
            of_class[tuple(result.params.get(key) for key in others)].append(goal.cost(result))
    for setting in costs[0].keys() & costs[1].keys():
        yield fmean(costs[1][setting]) - fmean(costs[0][setting])


def _beyond(numbers: Sequence[float], *, is_upwards: bool) -> str:
    """The next value after the end of a range, at the distance of the last two; empty if none makes sense.

    Positive numbers at least a factor of 1.5 apart are continued by this factor: 8, 16 → 32. Fractions stay below 1,
    positive numbers above 0.
    """
    ordered = sorted(set(numbers), reverse=not is_upwards)
    last, before = ordered[-1], ordered[-2]
    if min(last, before) > 0 and max(last / before, before / last) >= 1.5:
        value = last * last / before
    else:
        value = 2 * last - before
    is_whole = all(number == int(number) for number in ordered)
    value = float(math.floor(value) if is_whole and not is_upwards else math.ceil(value)) if is_whole else value
    is_possible = value > 0 if min(ordered) > 0 else value >= 0 if min(ordered) >= 0 else True
    if not is_possible or value == last or (max(ordered) <= 1 < value and not is_whole):
        return ""
    return str(int(value)) if is_whole else f"{value:.3g}"
