"""The leaderboard: runs in order, with what they differ in and what was measured; what every output is made from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from runner.errors import ConfigError, Fault
from runner.report import columns, comparable, condition, ranking
from runner.report.columns import Goal, Value
from runner.report.ranking import Group
from runner.report.results import Result
from runner.report.statistics import Mean
from runner.tracking.metrics_log import LOSS

T = TypeVar("T")
VERDICT = "against the best"
"""The column of groups that says whether they differ."""
FEW = 3
"""Repetitions below which speed, memory and time have no interval: two say of a machine what else it did."""


@dataclass(frozen=True)
class Leaderboard:
    """Results held against each other."""

    results: list[Result]
    """In order; those that are not completed come last."""
    params: list[str]
    """What they differ in."""
    metrics: list[str]
    """What is shown."""
    goal: Goal
    """What ``best`` is the best in."""
    best: Result
    axes: list[Goal] = field(default_factory=list)
    """What the Pareto front weighs against each other; empty where that was not asked for."""
    front: list[Result] = field(default_factory=list)
    over: str = ""
    """The parameter that the runs of a group differ in; empty where there are no groups."""
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def statuses(self) -> dict[str, int]:
        """Status → how many runs."""
        return dict(Counter(result.status for result in self.results))

    def keys(self) -> list[str]:
        """The columns of ``rows`` by their full names."""
        lead = ["run", *(["status"] if set(self.statuses) != {"completed"} else [])]
        return [*lead, *self.params, *self.metrics]

    def titles(self) -> list[str]:
        """The heads of ``rows``: those of parameters and metrics can be typed as keys."""
        return [columns.title(key, self.metrics) if key in self.metrics else key for key in self.keys()]

    def rows(self) -> list[list[str]]:
        """A row of text for each run; ★ is the best, ◆ on the Pareto front."""
        on_front = {id(result) for result in self.front}
        with_status = set(self.statuses) != {"completed"}
        rows = []
        for result in self.results:
            marks = "★" * (result is self.best) + "◆" * (id(result) in on_front)
            lead = [f"{marks} {result.run}".strip(), *([result.status] if with_status else [])]
            rows.append([*lead, *self.cells(result)])
        return rows

    def cells(self, result: Result) -> list[str]:
        """What a run has of the parameters and the metrics that are shown, as text."""
        return [columns.text(key, columns.value(result, key)) for key in self.params + self.metrics]

    @property
    def has_means(self) -> bool:
        """Whether there is anything to take together: runs that differ in ``over`` alone."""
        return any(len(group.results) > 1 for group in self.groups)

    @property
    def is_one_setting(self) -> bool:
        """Whether all runs are of one group: it is compared with nothing."""
        return self.has_means and len(self.groups) == 1

    def group_heading(self) -> str:
        """What the groups are, to stand above them."""
        alone = "; nothing else differs, so there is no other setting to hold it against" if self.is_one_setting else ""
        return f"mean ± 95 % interval over {self.over}{alone}"

    def group_titles(self) -> list[str]:
        setting = [key for key in self.params if key != self.over]
        verdict = [] if self.is_one_setting else [VERDICT]
        return [*setting, "n", *(columns.title(key, self.metrics) for key in self.metrics), *verdict]

    def group_rows(self) -> list[list[str]]:
        """A row of text for each group: means, with the interval that holds the true one in 95 of 100 cases."""
        setting = [key for key in self.params if key != self.over]
        rows = []
        for group in self.groups:
            n = group.means[self.goal.key].n if self.goal.key in group.means else 0
            count = str(n) if n == len(group.results) else f"{n} of {len(group.results)}"
            numbers = [mean_text(key, group.means.get(key)) for key in self.metrics]
            values = [columns.text(key, group.setting.get(key)) for key in setting]
            rows.append([*values, count, *numbers, *([] if self.is_one_setting else [verdict(group)])])
        return rows

    def table(self) -> tuple[list[str], list[list[Value]]]:
        """Everything by its full name, metrics as numbers, parameters as they were written: for programs."""
        names = ["run", "label", "status", "reason", "step", "is_best", *(["is_on_front"] if self.axes else [])]
        on_front = {id(result) for result in self.front}
        rows: list[list[Value]] = []
        for result in self.results:
            front = [id(result) in on_front] if self.axes else []
            values = [columns.value(result, key) for key in self.params + self.metrics]
            lead: list[Value] = [result.run, result.label, result.status, result.reason, result.step]
            rows.append([*lead, result is self.best, *front, *values, result.folder, result.mlflow_id])
        return [*names, *self.params, *self.metrics, "folder", "mlflow_run_id"], rows


def of(
    results: Sequence[Result],
    *,
    where: str = "",
    metrics: str = "",
    sort: str = "",
    by: str = "",
    pareto: str = "",
) -> Leaderboard:
    """Put the results on a board.

    Args:
        where: a condition, see ``condition``.
        metrics: names, with commas; else those that matter.
        sort: a key, ``+`` or ``-`` before it; else what a search of these runs looked for, or the loss at the end.
        by: the parameter over which runs are taken together.
        pareto: two keys or more, with commas.

    Raises:
        ConfigError: with every fault of these; or nothing to compare is left.
    """
    faults: list[Fault] = []
    asked: list[str] = []
    meets = _asked(faults, lambda: condition.parse(where, lambda word: _noted(word, results, asked)), where)
    shown = _asked(faults, lambda: [columns.metric(name, results, "--metrics") for name in metrics.split(",")], metrics)
    axes = _asked(faults, lambda: _axes(pareto, results), pareto)
    over = _asked(faults, lambda: _parameter(by, results), by)
    order = _asked(faults, lambda: columns.goal(sort, results, "--sort"), sort)
    goal = columns.rated(order) if order and any(order.key in result.metrics for result in results) else None
    if not faults:
        kept = [result for result in results if meets is None or meets(partial(columns.value, result))]
        comparable.refuse_nothing(kept, results, where, asked)
        comparable.refuse_mixed(kept)
        goal = goal or columns.objective(kept) or Goal(LOSS, is_larger_better=False)
        return _board(kept, goal, order or goal, shown or [], axes or [], over or "")
    raise ConfigError(*faults)


def mean_text(key: str, found: Mean | None) -> str:
    if found is None:
        return "–"
    text = columns.text(key, found.value)
    if found.half_width is None or (found.n < FEW and key.endswith(columns.OF_THE_MACHINE)):
        return text
    about = columns.text(key, found.half_width)
    number, _, unit = text.partition(" ")
    is_same = unit and about.partition(" ")[2] == unit and " " not in unit
    return f"{number} ± {about}" if is_same else f"{text} ± {about}"


def verdict(group: Group) -> str:
    """Whether a setting differs from the best one by more than chance would explain."""
    if group.is_best:
        return "★ best"
    if group.p is None:
        return "one run alone: no telling"
    p = f"p = {group.p:.2g}"
    return f"worse ({p})" if group.p < ranking.SIGNIFICANT else f"cannot be told apart ({p})"


def as_json(board: Leaderboard) -> dict[str, Any]:
    """The board for programs."""
    names, rows = board.table()
    found: dict[str, Any] = {
        "objective": board.goal.key, "larger_is_better": board.goal.is_larger_better, "parameters": board.params,
        "metrics": board.metrics, "best": board.best.run, "notes": board.notes,
        "runs": [
            {name: plain(found) if name in board.params else found for name, found in zip(names, row, strict=True)}
            for row in rows
        ],
    }  # fmt: skip
    if board.axes:
        found["pareto"] = {
            "axes": [axis.key for axis in board.axes], "front": [result.run for result in board.front]
        }  # fmt: skip
    if board.over:
        found["by"], found["groups"] = board.over, [_group_json(group) for group in board.groups]
    return found


def _group_json(group: Group) -> dict[str, Any]:
    means = {key: {"n": m.n, "mean": m.value, "half_width_95": m.half_width} for key, m in group.means.items()}
    setting = {key: plain(text) for key, text in group.setting.items()}
    return {"setting": setting, "runs": [result.run for result in group.results], "means": means,
            "p_against_best": group.p, "is_best": group.is_best}  # fmt: skip


def plain(text: Value) -> Any:
    """A parameter as JSON has it: ``"1"`` is 1, ``"true"`` is true; a text that is neither stays one."""
    if not isinstance(text, str):
        return text
    try:
        found = json.loads(text)
    except ValueError:
        return text
    is_plain = found is None or isinstance(found, bool | int) or (isinstance(found, float) and math.isfinite(found))
    return found if is_plain else text


def _board(
    results: Sequence[Result], goal: Goal, order: Goal, metrics: list[str], axes: list[Goal], over: str
) -> Leaderboard:
    best = ranking.best(results, goal)
    if best is None:
        names = sorted({key for result in results if result.is_completed for key in result.metrics})
        problem = f"no completed run has the metric {goal.key}"
        raise ConfigError(Fault("--sort", problem, f"name another with --sort: {', '.join(names) or 'there is none'}"))
    params = ranking.differing(results)
    matter = [key for short in columns.MATTER for key in columns.SHORT[short]]
    shown = metrics or [key for key in matter if any(key in result.metrics for result in results)]
    shown = list(dict.fromkeys([*shown, *(axis.key for axis in axes)]))
    if goal.key not in shown:
        shown.insert(0, goal.key)
    groups = ranking.grouped(results, params, over, goal, shown) if over else []
    notes = ranking.cautions(results, params)
    if not params and len(results) > 1:
        notes.append("the runs differ in no parameter")
    front = ranking.front(results, axes) if axes else []
    made = Leaderboard(ranking.ordered(results, order), params, shown, goal, best, axes, front, over, groups, notes)
    if over and not made.has_means:
        notes.append(f"no two runs differ in {over} alone: there is nothing to average")
    return made


def _asked(faults: list[Fault], read: Callable[[], T], text: str) -> T | None:
    """What an option says; None where it was not given, or is wrong, which is noted."""
    if not text:
        return None
    try:
        return read()
    except ConfigError as error:
        faults.extend(error.faults)
        return None


def _axes(text: str, results: Sequence[Result]) -> list[Goal]:
    names = text.split(",")
    if len(names) < 2:
        raise ConfigError(Fault("--pareto", "needs two metrics or more", "--pareto memory,loss", text))
    goals = [columns.goal(name, results, "--pareto") for name in names]
    return [Goal(columns.metric(goal.key, results, "--pareto"), goal.is_larger_better) for goal in goals]


def _parameter(word: str, results: Sequence[Result]) -> str:
    key = columns.resolve(word, results, "--by")
    if not any(key in result.params for result in results):
        raise ConfigError(Fault("--by", f"'{word}' is no parameter", "name one that runs were repeated over: seed"))
    return key


def _noted(word: str, results: Sequence[Result], asked: list[str]) -> str:
    """The key that a word of the condition means, which is noted."""
    asked.append(columns.resolve(word, results, "--where"))
    return asked[-1]
