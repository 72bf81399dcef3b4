"""The leaderboard: ranked runs with the parameters that differ and their metrics; the source of all output formats."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from runner.config import condition
from runner.errors import ConfigError, Fault, refuse
from runner.report import columns, comparable, ranking
from runner.report.columns import Goal, Value
from runner.report.ranking import Group
from runner.report.results import Result
from runner.report.statistics import Mean

T = TypeVar("T")
VERDICT = "compared with best"
"""The title of the column with the result of the significance test."""
FEW = 3
"""Speed, memory and time get an interval from this number of repetitions on: two are mostly noise of the machine."""


@dataclass(frozen=True)
class Leaderboard:
    """A comparison of runs."""

    results: list[Result]
    """In order of rank; runs that are not completed come last."""
    params: list[str]
    """The parameters that differ between the runs."""
    metrics: list[str]
    """The metrics to show."""
    goal: Goal
    """Decides which run is ``best``."""
    best: Result
    axes: list[Goal] = field(default_factory=list)
    """The goals of the Pareto front; empty without ``--pareto``."""
    front: list[Result] = field(default_factory=list)
    over: str = ""
    """The parameter that groups average over (``--by``); empty if there are no groups."""
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def statuses(self) -> dict[str, int]:
        """Status → how many runs."""
        return dict(Counter(result.status for result in self.results))

    def keys(self) -> list[str]:
        """The full keys of the columns of ``rows``."""
        lead = ["run", *(["status"] if set(self.statuses) != {"completed"} else [])]
        return [*lead, *self.params, *self.metrics]

    def titles(self) -> list[str]:
        """The titles of the columns of ``rows``; titles of parameters and metrics can be typed as keys."""
        return [columns.title(key, self.metrics) if key in self.metrics else key for key in self.keys()]

    def rows(self) -> list[list[str]]:
        """One row of text for each run; ★ marks the best run, ◆ a run on the Pareto front."""
        on_front = {id(result) for result in self.front}
        with_status = set(self.statuses) != {"completed"}
        rows = []
        for result in self.results:
            marks = "★" * (result is self.best) + "◆" * (id(result) in on_front)
            lead = [f"{marks} {result.run}".strip(), *([result.status] if with_status else [])]
            rows.append([*lead, *self.cells(result)])
        return rows

    def cells(self, result: Result) -> list[str]:
        """The parameters and metrics of a run as text."""
        return [columns.text(key, columns.value(result, key)) for key in self.params + self.metrics]

    def legend(self) -> str:
        """Explain the marks in ``rows``."""

        def named(goal: Goal) -> str:
            better = "larger" if goal.is_larger_better else "smaller"
            return f"{columns.title(goal.key, self.metrics)} ({better} is better)"

        best = f"★ best run: {named(self.goal)}"
        axes = " and ".join(map(named, self.axes))
        front = f"; ◆ Pareto front of {axes}: no run is as good in all of them and better in one, in the digits shown"
        return best + (front if self.axes else "")

    @property
    def has_means(self) -> bool:
        """Whether any group has several runs, that is, runs that differ only in ``over``."""
        return any(len(group.results) > 1 for group in self.groups)

    @property
    def is_one_setting(self) -> bool:
        """Whether all runs are in one group, so that there is no other group to compare with."""
        return self.has_means and len(self.groups) == 1

    def group_heading(self) -> str:
        """The heading of the table of groups."""
        alone = "; nothing else differs, so there is no other setting to compare with" if self.is_one_setting else ""
        return f"mean ± 95 % confidence interval over {self.over}{alone}"

    def group_titles(self) -> list[str]:
        setting = [key for key in self.params if key != self.over]
        verdict = [] if self.is_one_setting else [VERDICT]
        return [*setting, "n", *(columns.title(key, self.metrics) for key in self.metrics), *verdict]

    def group_rows(self) -> list[list[str]]:
        """One row of text for each group: its parameters, and means with 95 % confidence intervals."""
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
        """(full column names, rows) for CSV and JSON: metrics as numbers, parameters as text."""
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
    """Compare the results.

    Args:
        where: a condition on runs, see ``condition``.
        metrics: comma-separated metrics to show; default: columns.by_default.
        sort: a key, optionally after ``+`` or ``-``; default: the objective of the runs' search, or see
            ``ranking.default_goal``.
        by: the parameter to average over (seed).
        pareto: at least two comma-separated metrics.

    Raises:
        ConfigError: with the faults of all options; or no completed run is left to compare.
    """
    faults: list[Fault] = []
    keys: list[str] = []

    def resolve(word: str) -> str:
        keys.append(columns.resolve(word, results, "--where"))
        return keys[-1]

    matches = _parsed(faults, lambda: condition.parse(where, resolve), where)
    names = metrics.split(",")
    shown = _parsed(faults, lambda: [columns.metric(name, results, "--metrics") for name in names], metrics)
    axes = _parsed(faults, lambda: _axes(pareto, results), pareto)
    over = _parsed(faults, lambda: _parameter(by, results), by)
    order = _parsed(faults, lambda: columns.goal(sort, results, "--sort"), sort)
    goal = columns.rated(order) if order and any(order.key in result.metrics for result in results) else None
    refuse(faults)
    kept = [result for result in results if matches is None or matches(partial(columns.value, result))]
    comparable.refuse_nothing(kept, results, where, keys)
    comparable.refuse_mixed(kept)
    goal = goal or columns.objective(kept) or ranking.default_goal(kept)
    return _board(kept, goal, order or goal, shown or [], axes or [], over or "")


def mean_text(key: str, mean: Mean | None) -> str:
    """``3.6094 ± 0.0012``; without the interval if there are too few values, a dash for None."""
    if mean is None:
        return "–"
    text = columns.text(key, mean.value)
    if mean.half_width is None or (mean.n < FEW and key.endswith(columns.OF_THE_MACHINE)):
        return text
    half_width = columns.text(key, mean.half_width)
    number, _, unit = text.partition(" ")
    has_same_unit = unit and half_width.partition(" ")[2] == unit and " " not in unit
    return f"{number} ± {half_width}" if has_same_unit else f"{text} ± {half_width}"


def verdict(group: Group) -> str:
    """Whether the group is significantly worse than the best group (Welch's t-test)."""
    if group.is_best:
        return "★ best"
    if group.p is None:
        return "only one run: cannot test"
    p = f"p = {group.p:.2g}"
    return f"worse ({p})" if group.p < ranking.SIGNIFICANT else f"no significant difference ({p})"


def as_json(board: Leaderboard) -> dict[str, Any]:
    """The leaderboard as the output of ``--json``."""
    names, rows = board.table()
    output: dict[str, Any] = {
        "objective": board.goal.key, "larger_is_better": board.goal.is_larger_better, "parameters": board.params,
        "metrics": board.metrics, "best": board.best.run, "notes": board.notes,
        "runs": [
            {name: plain(value) if name in board.params else value for name, value in zip(names, row, strict=True)}
            for row in rows
        ],
    }  # fmt: skip
    if board.axes:
        front = [result.run for result in board.front]
        output["pareto"] = {"axes": [axis.key for axis in board.axes], "front": front}
    if board.over:
        output["by"], output["groups"] = board.over, [_group_json(group) for group in board.groups]
    return output


def _group_json(group: Group) -> dict[str, Any]:
    means = {key: {"n": m.n, "mean": m.value, "half_width_95": m.half_width} for key, m in group.means.items()}
    setting = {key: plain(text) for key, text in group.setting.items()}
    return {"setting": setting, "runs": [result.run for result in group.results], "means": means,
            "p_against_best": group.p, "is_best": group.is_best}  # fmt: skip


def plain(text: Value) -> Any:
    """The JSON value of a parameter: ``"1"`` → 1, ``"true"`` → true; other texts stay texts."""
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    is_scalar = value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_scalar else text


def _board(
    results: Sequence[Result], goal: Goal, order: Goal, metrics: list[str], axes: list[Goal], over: str
) -> Leaderboard:
    best = ranking.best(results, goal)
    if best is None:
        names = sorted({key for result in results if result.is_completed for key in result.metrics})
        problem = f"no completed run has the metric {goal.key}"
        raise ConfigError(Fault("--sort", problem, f"choose another with --sort: {', '.join(names) or '(no metrics)'}"))
    params = ranking.differing(results)
    shown = metrics or columns.by_default(results)
    shown = list(dict.fromkeys([*shown, *(axis.key for axis in axes)]))
    if goal.key not in shown:
        shown.insert(0, goal.key)
    groups = ranking.grouped(results, params, over, goal, shown) if over else []
    notes = ranking.cautions(results, params)
    if not params and len(results) > 1:
        notes.append("all runs have the same parameters")
    front = ranking.front(results, axes) if axes else []
    board = Leaderboard(ranking.ordered(results, order), params, shown, goal, best, axes, front, over, groups, notes)
    if over and not board.has_means:
        notes.append(f"no two runs differ only in {over}: nothing to average")
    return board


def _parsed(faults: list[Fault], parse: Callable[[], T], text: str) -> T | None:
    """The parsed option; None if the option is not set, or invalid: its faults are then added to ``faults``."""
    if not text:
        return None
    try:
        return parse()
    except ConfigError as error:
        faults.extend(error.faults)
        return None


def _axes(text: str, results: Sequence[Result]) -> list[Goal]:
    names = text.split(",")
    if len(names) < 2:
        raise ConfigError(Fault("--pareto", "needs at least two metrics", "for example --pareto memory,loss", text))
    goals = [columns.goal(name, results, "--pareto") for name in names]
    return [Goal(columns.metric(goal.key, results, "--pareto"), goal.is_larger_better) for goal in goals]


def _parameter(word: str, results: Sequence[Result]) -> str:
    key = columns.resolve(word, results, "--by")
    if not any(key in result.params for result in results):
        raise ConfigError(Fault("--by", f"'{word}' is not a parameter", "name the repeated parameter, such as seed"))
    return key
