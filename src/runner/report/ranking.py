"""Rank runs: differing parameters, best run, Pareto fronts, groups over seeds, parameter importance."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from statistics import fmean

from runner.config import schema
from runner.report import columns, statistics
from runner.report.columns import Goal, Value
from runner.report.results import Result
from runner.report.statistics import Mean
from runner.tracking.manifest import RUN_TIME_KEYS
from runner.tracking.metrics_log import LOSS

SIGNIFICANT = 0.05
"""Significance level: a difference between two groups counts if its p value is below this."""
LEVELS, BINS = 6, 4
"""A numeric parameter with at least LEVELS different values is divided into BINS classes of equal size."""
HELD_OUT = ("data", "data.path", "data.eval_path", "data.eval_fraction", "data.eval_rows", "data.max_length",
            "data.format", "data.revision")  # fmt: skip
"""Parameters that change the text on which the eval loss is measured."""
ON_POLICY = {"grpo", "rloo"}
OF_TRAINING = ("task.head_lr_ratio", "task.lmbda", "task.max_completion_length", "task.sampling_temperature")
"""Parameters of tasks that are no part of the evaluation loss."""
PREFERENCES = "eval/rewards/accuracies"
ACCURACY = {"classify": "eval/accuracy", **dict.fromkeys(("dpo", "cpo", "simpo", "orpo", "reward"), PREFERENCES)}
"""Task → the metric that ranks runs of different losses."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in one parameter (the seed)."""

    setting: Mapping[str, str]
    """The other differing parameters, equal for all runs of the group."""
    results: list[Result]
    """All runs of the group, including those that are not completed."""
    means: Mapping[str, Mean]
    """Metric → mean over the completed runs that have it; includes the ranked metric."""
    p: float | None = None
    """The p value of Welch's t-test against the best group; None for the best group, or if either has only one run."""
    is_best: bool = False


def differing(results: Sequence[Result]) -> list[str]:
    """The parameters that differ between the runs, in the order of the configuration.

    Without run-time keys (launcher, tracking, paths), and without keys that only follow from the chosen option of
    their group: with ``quant=none,4bit``, ``quant.compute_dtype`` is left out unless the user set it.
    """
    known = [result for result in results if result.params]
    keys = dict.fromkeys(key for result in known for key in result.params)
    candidates = [key for key in keys if key.split(".")[0] not in RUN_TIME_KEYS]
    varying = [key for key in candidates if len({result.params.get(key) for result in known}) > 1]
    return [key for key in varying if not (_groups_of(key) & set(varying) and _follows(key, known))]


def ordered(results: Sequence[Result], goal: Goal) -> list[Result]:
    """The completed runs sorted by ``goal``, the best first; then the other runs, sorted in the same way."""
    return sorted(results, key=lambda result: (not result.is_completed, *_sort_key(result, goal), result.label))


def best(results: Sequence[Result], goal: Goal) -> Result | None:
    """The best completed run; None if no completed run has the value."""
    rated = [result for result in results if result.is_completed and math.isfinite(goal.cost(result))]
    return min(rated, key=goal.cost, default=None)


def front(results: Sequence[Result], goals: Sequence[Goal]) -> list[Result]:
    """The Pareto front: the completed runs that no other run dominates, sorted by the first goal, the best first.

    A run dominates another if it is at least as good in all goals and better in one, in the digits that a table shows.
    """
    completed = [result for result in results if result.is_completed]
    costs = [tuple(goal.shown_cost(result) for goal in goals) for result in completed]
    return [completed[index] for index in _undominated(costs)]


def fronts(results: Sequence[Result], goals: Sequence[Goal]) -> dict[tuple[str, str], list[int]]:
    """The Pareto front of each pair of goals, as indices into ``results``; a pair has the order of ``goals``."""
    completed = [index for index, result in enumerate(results) if result.is_completed]
    costs = {goal.key: [goal.shown_cost(results[index]) for index in completed] for goal in goals}
    pairs = combinations_with_replacement(costs, 2)
    return {
        (one, other): [completed[n] for n in _undominated(list(zip(costs[one], costs[other], strict=True)))]
        for one, other in pairs
    }


def grouped(
    results: Sequence[Result], keys: Sequence[str], over: str, goal: Goal, metrics: Sequence[str]
) -> list[Group]:
    """Group the runs that differ only in ``over``; the best mean first, groups without the metric last."""
    shared = [key for key in keys if key != over]
    members: dict[tuple[str | None, ...], list[Result]] = defaultdict(list)
    for result in results:
        members[tuple(result.params.get(key) for key in shared)].append(result)
    names = list(dict.fromkeys([goal.key, *metrics]))
    groups = [
        Group({key: runs[0].params[key] for key in shared if key in runs[0].params}, runs, _means(runs, names))
        for runs in members.values()
    ]
    sign = -1 if goal.is_larger_better else 1
    has_repeats = any(len(_values(group.results, goal.key)) > 1 for group in groups)

    def sort_key(group: Group) -> tuple[bool, float]:
        """Groups of one run come after groups of several: one run is too little to be the best."""
        mean = group.means.get(goal.key)
        return has_repeats and (mean is None or mean.n < 2), sign * mean.value if mean else math.inf

    groups.sort(key=sort_key)
    if not groups or goal.key not in groups[0].means:
        return groups
    first = _values(groups[0].results, goal.key)
    others = (replace(each, p=statistics.welch(first, _values(each.results, goal.key))) for each in groups[1:])
    return [replace(groups[0], is_best=True), *others]


def importance(results: Sequence[Result], keys: Sequence[str], goal: Goal) -> list[tuple[str, float]]:
    """(parameter, share of the variance of the ranks in ``goal`` that it explains alone, 0 to 1), the largest first.

    One-way analysis of variance with Kelley's epsilon squared, which corrects for what the number of classes explains
    by chance (T. L. Kelley 1935, "An unbiased correlation ratio measure"). Computed on ranks, so that a few diverged
    runs do not dominate. Interactions are ignored.
    """
    rated = [result for result in results if result.is_completed and math.isfinite(goal.cost(result))]
    ranks = _ranks([goal.cost(result) for result in rated])
    shares = [(key, _explained(_classes([columns.value(result, key) for result in rated]), ranks)) for key in keys]
    return sorted(((key, share) for key, share in shares if share is not None), key=lambda pair: -pair[1])


def cautions(results: Sequence[Result], keys: Sequence[str]) -> list[str]:
    """Warnings that some values of these runs may not be comparable."""
    notes = []
    if other := [key for key in keys if _of_source(key) in HELD_OUT]:
        notes.append(f"the runs differ in {', '.join(other)}: their losses may be measured on different text")
    if other := of_loss(results, keys):
        notes.append(f"the runs differ in {', '.join(other)}, part of the loss: their losses are not comparable")
    counts = [result.held_out_rows for result in results if result.held_out_rows is not None]
    if few := schema.few_held_out(min(counts, default=None)):
        notes.append(few)
    if {"model", "model.path"} & set(keys):
        notes.append("the models differ: compare the loss per token only between models with the same tokenizer")
    if len(devices := sorted({result.device for result in results} - {""})) > 1:
        notes.append(f"the runs used different devices ({', '.join(devices)}): speed and memory are not comparable")
    if len(stores := sorted({result.store for result in results} - {""})) > 1:
        notes.append(f"the runs are in {len(stores)} MLflow stores ({', '.join(stores)}): no store has all of them; "
                     "the values here are from the run folders")  # fmt: skip
    return notes


def of_loss(results: Sequence[Result], keys: Sequence[str]) -> list[str]:
    """Those of ``keys`` that are part of the loss. The evaluation loss of ``ON_POLICY`` is the negative reward."""
    if {result.params.get("task") for result in results} <= ON_POLICY:
        return []
    return [key for key in keys if key.startswith("task.") and key not in OF_TRAINING]


def default_goal(results: Sequence[Result]) -> Goal:
    """The loss; or the task's accuracy, where the losses are not comparable."""
    accuracy = ACCURACY.get(results[0].params.get("task", ""), "")
    if of_loss(results, differing(results)) and all(accuracy in each.metrics for each in results if each.is_completed):
        return Goal(accuracy, is_larger_better=True)
    return Goal(LOSS, is_larger_better=False)


def _of_source(key: str) -> str:
    """The key of a source of a mixture as a key of ``data``."""
    return re.sub(r"^data\.sources\.[^.]+\.", "data.", key)


def _groups_of(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def _follows(key: str, results: Sequence[Result]) -> bool:
    return all(key not in result.params or key in result.implied for result in results)


def _sort_key(result: Result, goal: Goal) -> tuple[float, str]:
    """(cost, "") for a number; (infinity, text) for a parameter that is text."""
    value = columns.value(result, goal.key)
    return goal.cost(result), value if isinstance(value, str) else ""


def _undominated(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """The indices of the costs that no other cost dominates, sorted by cost; costs with an infinity are left out."""
    indices: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for index, cost in enumerate(costs):
        if all(map(math.isfinite, cost)):
            indices[cost].append(index)
    kept: list[tuple[float, ...]] = []
    for cost in sorted(
        indices
    ):  # a dominating cost sorts before the dominated one; with two goals, check the last kept
        if not any(_dominates(other, cost) for other in (kept[-1:] if len(cost) == 2 else kept)):
            kept.append(cost)
    return [index for cost in kept for index in indices[cost]]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether ``one`` is at most ``other`` in every component; the two must not be equal."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def _values(results: Sequence[Result], key: str) -> list[float]:
    numbers = [columns.number(columns.value(result, key)) for result in results if result.is_completed]
    return [number for number in numbers if number is not None]


def _means(results: Sequence[Result], names: Sequence[str]) -> dict[str, Mean]:
    values = {name: _values(results, name) for name in names}
    return {name: statistics.mean(numbers) for name, numbers in values.items() if numbers}


def _classes(values: Sequence[Value]) -> list[str]:
    """The class of each value: the value itself, or one of BINS quantiles for numbers with at least LEVELS values."""
    numbers = [columns.number(value) for value in values]
    distinct = sorted({number for number in numbers if number is not None})
    if None in numbers or len(distinct) < LEVELS:
        return [str(value) for value in values]
    rank = {number: index for index, number in enumerate(distinct)}
    return [str(rank[number] * BINS // len(distinct)) for number in numbers if number is not None]


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values get the mean of their ranks."""
    positions: dict[float, list[int]] = defaultdict(list)
    for position, value in enumerate(sorted(values), 1):
        positions[value].append(position)
    return [fmean(positions[value]) for value in values]


def _explained(classes: Sequence[str], ranks: Sequence[float]) -> float | None:
    """Epsilon squared; None if there is only one class, no class with two values, or no variance."""
    sizes = Counter(classes)
    if len(sizes) < 2 or len(sizes) >= len(ranks):
        return None
    members: dict[str, list[float]] = defaultdict(list)
    for name, rank in zip(classes, ranks, strict=True):
        members[name].append(rank)
    mean = fmean(ranks)
    total = sum((rank - mean) ** 2 for rank in ranks)
    if total == 0:
        return None
    within = sum((rank - fmean(group)) ** 2 for group in members.values() for rank in group)
    noise = within / (len(ranks) - len(sizes))
    return max(0.0, (total - within - (len(sizes) - 1) * noise) / total)
