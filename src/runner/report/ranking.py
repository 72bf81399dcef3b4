"""Runs held against each other: what they differ in, which is best, what trade-offs are left, what mattered."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from statistics import fmean

from runner.report import columns, statistics
from runner.report.columns import Goal, Value
from runner.report.results import Result
from runner.report.statistics import Mean
from runner.tracking.manifest import RUN_TIME_KEYS

SIGNIFICANT = 0.05
"""Two settings whose p is below this can be told apart."""
LEVELS, BINS = 6, 4
"""A number with that many values and more is cut into that many classes of equal size."""
HELD_OUT = ("data", "data.path", "data.eval_path", "data.eval_fraction", "data.eval_rows", "data.max_length",
            "data.format", "data.revision")  # fmt: skip
"""What changes the text that the loss is measured on."""


@dataclass(frozen=True)
class Group:
    """The runs of one setting, which differ in one parameter alone (the seed)."""

    setting: Mapping[str, str]
    results: list[Result]
    """All of them; those without a number count in nothing."""
    means: Mapping[str, Mean]
    """Metric → over the completed runs that have it; the one that is ranked by is among them."""
    p: float | None = None
    """Of Welch's t-test against the best setting; None for that itself, and where one run alone says nothing."""
    is_best: bool = False


def differing(results: Sequence[Result]) -> list[str]:
    """The parameters that are not the same in all runs, in the order of the configuration.

    Where and how a run happened is left out, and what merely follows from a group: ``quant.compute_dtype`` beside
    ``quant=none,4bit``, unless somebody set it.
    """
    known = [result for result in results if result.params]
    keys = dict.fromkeys(key for result in known for key in result.params)
    candidates = [key for key in keys if key.split(".")[0] not in RUN_TIME_KEYS]
    varying = [key for key in candidates if len({result.params.get(key) for result in known}) > 1]
    return [key for key in varying if not (_groups_of(key) & set(varying) and _follows(key, known))]


def ordered(results: Sequence[Result], goal: Goal) -> list[Result]:
    """The completed runs by ``goal``, the better first; then those that are not completed, in the same way."""
    return sorted(results, key=lambda result: (not result.is_completed, *_place(result, goal), result.label))


def best(results: Sequence[Result], goal: Goal) -> Result | None:
    """The best of the completed runs; None where none has the number."""
    rated = [result for result in results if result.is_completed and math.isfinite(goal.cost(result))]
    return min(rated, key=goal.cost, default=None)


def front(results: Sequence[Result], goals: Sequence[Goal]) -> list[Result]:
    """The Pareto front: the completed runs that no other beats in one goal without being worse in another.

    In the order of the first goal, the better first; runs that are equal in all goals are on it together.
    """
    completed = [result for result in results if result.is_completed]
    costs = [tuple(goal.cost(result) for goal in goals) for result in completed]
    return [completed[place] for place in _unbeaten(costs)]


def fronts(results: Sequence[Result], goals: Sequence[Goal]) -> dict[tuple[str, str], list[int]]:
    """The front of any two of these goals, as places in ``results``; a pair is in the order of ``goals``."""
    places = [place for place, result in enumerate(results) if result.is_completed]
    costs = {goal.key: [goal.cost(results[place]) for place in places] for goal in goals}
    pairs = combinations_with_replacement(costs, 2)
    return {
        (one, other): [places[n] for n in _unbeaten(list(zip(costs[one], costs[other], strict=True)))]
        for one, other in pairs
    }


def grouped(
    results: Sequence[Result], keys: Sequence[str], over: str, goal: Goal, metrics: Sequence[str]
) -> list[Group]:
    """The runs in groups that differ in ``over`` alone, the best mean first; those without a number last."""
    shared = [key for key in keys if key != over]
    members: dict[tuple[str | None, ...], list[Result]] = defaultdict(list)
    for result in results:
        members[tuple(result.params.get(key) for key in shared)].append(result)
    names = list(dict.fromkeys([goal.key, *metrics]))
    groups = [
        Group({key: found[0].params[key] for key in shared if key in found[0].params}, found, _means(found, names))
        for found in members.values()
    ]
    sign = -1 if goal.is_larger_better else 1
    several = any(len(_values(group.results, goal.key)) > 1 for group in groups)

    def place(group: Group) -> tuple[bool, float]:
        """One run among settings with several says too little to be the best of them."""
        found = group.means.get(goal.key)
        return several and (found is None or found.n < 2), sign * found.value if found else math.inf

    groups.sort(key=place)
    if not groups or goal.key not in groups[0].means:
        return groups
    first = _values(groups[0].results, goal.key)
    tested = [
        Group(group.setting, group.results, group.means, statistics.welch(first, _values(group.results, goal.key)))
        for group in groups[1:]
    ]
    return [Group(groups[0].setting, groups[0].results, groups[0].means, None, True), *tested]


def importance(results: Sequence[Result], keys: Sequence[str], goal: Goal) -> list[tuple[str, float]]:
    """How much of the variance of the ranks in ``goal`` each parameter explains alone (0 to 1), the most first.

    One-way analysis of variance with Kelley's epsilon squared, which takes off what so many classes explain by chance
    (T. L. Kelley 1935, "An unbiased correlation ratio measure"); of ranks, so that a few runs that diverged do not
    decide. Interactions are not in it.
    """
    rated = [result for result in results if result.is_completed and math.isfinite(goal.cost(result))]
    ranks = _ranks([goal.cost(result) for result in rated])
    explained = [(key, _explained(_classes([columns.value(result, key) for result in rated]), ranks)) for key in keys]
    return sorted(((key, share) for key, share in explained if share is not None), key=lambda pair: -pair[1])


def cautions(results: Sequence[Result], keys: Sequence[str]) -> list[str]:
    """Why the numbers may not be alike although they stand side by side."""
    said = []
    if other := [key for key in keys if key in HELD_OUT]:
        said.append(f"the runs differ in {', '.join(other)}: their losses may not be measured on the same text")
    if {"model", "model.path"} & set(keys):
        said.append("the models differ: a loss per token compares only those that share a tokenizer")
    if len(devices := sorted({result.device for result in results} - {""})) > 1:
        said.append(f"they ran on different devices ({', '.join(devices)}): so do speed and memory differ")
    if len(stores := sorted({result.store for result in results} - {""})) > 1:
        said.append(f"these numbers are those of the folders: no page of MLflow has all of the runs, they were told to "
                    f"{len(stores)} stores ({', '.join(stores)})")  # fmt: skip
    return said


def _groups_of(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def _follows(key: str, results: Sequence[Result]) -> bool:
    return all(key not in result.params or key in result.implied for result in results)


def _place(result: Result, goal: Goal) -> tuple[float, str]:
    """Where a run stands: by the number, or by the text of a parameter that is none."""
    found = columns.value(result, goal.key)
    return goal.cost(result), found if isinstance(found, str) else ""


def _unbeaten(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """The places of those that no other beats, the smallest first; an infinite cost is none."""
    places: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for place, own in enumerate(costs):
        if all(map(math.isfinite, own)):
            places[own].append(place)
    kept: list[tuple[float, ...]] = []
    for own in sorted(places):  # whoever beats one comes before it in this order; of two costs the last kept does
        if not any(_beats(other, own) for other in (kept[-1:] if len(own) == 2 else kept)):
            kept.append(own)
    return [place for own in kept for place in places[own]]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is nowhere larger; the two are not equal."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def _values(results: Sequence[Result], key: str) -> list[float]:
    numbers = [columns.number(columns.value(result, key)) for result in results if result.is_completed]
    return [number for number in numbers if number is not None]


def _means(results: Sequence[Result], names: Sequence[str]) -> dict[str, Mean]:
    found = {name: _values(results, name) for name in names}
    return {name: statistics.mean(values) for name, values in found.items() if values}


def _classes(values: Sequence[Value]) -> list[str]:
    """The class that each value falls into: itself, or a quarter of the range of ranks for a number of many values."""
    numbers = [columns.number(value) for value in values]
    distinct = sorted({number for number in numbers if number is not None})
    if None in numbers or len(distinct) < LEVELS:
        return [str(value) for value in values]
    rank = {number: place for place, number in enumerate(distinct)}
    return [str(rank[number] * BINS // len(distinct)) for number in numbers if number is not None]


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value, from 1; equal ones share the mean of theirs."""
    places: dict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values), 1):
        places[value].append(place)
    return [fmean(places[value]) for value in values]


def _explained(classes: Sequence[str], ranks: Sequence[float]) -> float | None:
    """Epsilon squared; None where there is nothing to explain or nothing is left to estimate the noise by."""
    sizes = Counter(classes)
    if len(sizes) < 2 or len(sizes) >= len(ranks):
        return None
    members: dict[str, list[float]] = defaultdict(list)
    for name, rank in zip(classes, ranks, strict=True):
        members[name].append(rank)
    middle = fmean(ranks)
    total = sum((rank - middle) ** 2 for rank in ranks)
    if total == 0:
        return None
    within = sum((rank - fmean(group)) ** 2 for group in members.values() for rank in group)
    noise = within / (len(ranks) - len(sizes))
    return max(0.0, (total - within - (len(sizes) - 1) * noise) / total)
