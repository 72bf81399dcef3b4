"""Columns of a comparison: resolve the names of metrics and parameters, and format their values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.config import pinned_weights, synonyms
from runner.errors import ConfigError, Fault, suggest
from runner.report.results import Result
from runner.terminal import duration, nearest
from runner.tracking.metrics_log import BEST, LOSS, SECONDS

SPEED, GPU_MEMORY, CPU_MEMORY = "train/tokens_per_second", "memory/peak_allocated_gib", "memory/peak_rss_gib"
SHORT = {"loss": [LOSS], "best": [BEST], "tokens/s": [SPEED], "memory": [GPU_MEMORY, CPU_MEMORY], "time": [SECONDS]}
"""Short name → the metrics that it may mean; the first that any run has is used."""
MATTER = ("loss", "best", "tokens/s", "memory", "time")
"""The metrics shown by default, with those that the task reports after the first two."""
OF_LOSS = ("perplexity",)
"""Suffixes of metrics that are not shown by default, because they follow from the loss."""
ABOUT = ("run", "label", "status", "reason", "sweep", "folder", "mlflow_id", "came_from")
"""Fields of a Result that can be used as keys besides parameters and metrics."""
LARGER_IS_BETTER = (
    "accuracy", "accuracies", "per_second", "mfu", "/reward", "rewards/chosen", "margins", "/margin", "f1", "pearson",
    "/acc", "/acc_norm", "_match", "/pass@1", "/bleu", "/rouge1", "/rouge2", "/rougeL", "/mcc",
)  # fmt: skip
SMALLER_IS_BETTER = (
    "loss",
    "objective",
    "nll",
    "/mse",
    "/mae",
    "perplexity",
    "rewards/rejected",
    "gib",
    "seconds",
    "data_wait_fraction",
)
"""Suffixes of metric names that decide which direction is better, whatever the sort order."""
REWARDS = "/rewards/"
"""What the functions of ``task.rewards`` give."""
OF_THE_MACHINE = ("per_second", "seconds", "gib", "mfu", "data_wait_fraction")
"""Suffixes of metrics that depend on the machine and its load."""
FRACTION, DIGITS = re.compile(r"-?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE), 7
"""A number as a search writes it; longer ones than DIGITS characters are rounded."""
NAMED = 12
"""Number of names that a message lists."""

Value = str | float | None


@dataclass(frozen=True)
class Goal:
    """A metric or parameter, and whether larger values are better."""

    key: str
    is_larger_better: bool

    def cost(self, result: Result) -> float:
        """The value with the sign that makes smaller better; infinite if the run has no such number."""
        measured = number(value(result, self.key))
        return math.inf if measured is None else -measured if self.is_larger_better else measured

    def shown_cost(self, result: Result) -> float:
        """Like ``cost``, with the digits that a table shows: what looks equal there is equal."""
        cost = self.cost(result)
        return math.copysign(shown(self.key, abs(cost)), cost) if math.isfinite(cost) else cost


def goal(text: str, results: Sequence[Result], option: str) -> Goal:
    """Parse a sort key. ``-KEY``: larger is better, ``+KEY``: smaller is better, ``KEY``: decided by the name (larger
    for accuracy and speed, else smaller).

    Raises:
        ConfigError: no run has the key.
    """
    key = resolve(text.lstrip("+-"), results, option)
    return Goal(key, True) if text.startswith("-") else Goal(key, False) if text.startswith("+") else by_name(key)


def by_name(key: str) -> Goal:
    """Decide by the name of the key whether larger is better; smaller if the name is unknown."""
    return Goal(key, key.endswith(LARGER_IS_BETTER) or (REWARDS in key and not key.endswith(SMALLER_IS_BETTER)))


def objective(results: Sequence[Result]) -> Goal | None:
    """The (first) objective of the search that these runs belong to; None unless all runs have the same objective."""
    objectives = {(r.params.get("search.objective", ""), r.params.get("search.direction", "")) for r in results}
    name, direction = map(_first, objectives.pop() if len(objectives) == 1 else ("", ""))
    is_known = any(name in result.metrics for result in results)
    return Goal(name, direction == "maximize") if is_known else None


def by_default(results: Sequence[Result]) -> list[str]:
    """The metrics to show by default: those of MATTER and those that the tasks of the runs report."""
    of_tasks = dict.fromkeys(name for result in results for name in result.task_metrics if not name.endswith(OF_LOSS))
    names = [*SHORT["loss"], *SHORT["best"], *of_tasks, *(key for short in MATTER for key in SHORT[short])]
    return [key for key in dict.fromkeys(names) if any(key in result.metrics for result in results)]


def _first(text: str) -> str:
    """The first item of a list that is stored as text: ``['eval/loss', 'train/tokens']``."""
    return text.strip("[]").partition(",")[0].strip("'\" ")


def rated(order: Goal) -> Goal:
    """The goal that decides which run is best: by the name of the metric if known (loss, accuracy), else ``order``."""
    return by_name(order.key) if is_rated(order.key) else order


def is_rated(key: str) -> bool:
    """Whether the better direction is known from the name of the key."""
    return REWARDS in key or key.endswith((*LARGER_IS_BETTER, *SMALLER_IS_BETTER))


def resolve(word: str, results: Sequence[Result], option: str) -> str:
    """The key that a word means: a full key, a short name, ``data/format``, or the unique end of a key (``r``).

    ``name`` means ``label``, because the config key ``name`` is empty in most runs.

    Raises:
        ConfigError: the word matches no key, or several.
    """
    params = {key for result in results for key in result.params}
    metrics = {key for result in results for key in result.metrics}
    if word == "name":
        return "label"
    for key in (word, word.replace("/", ".")):
        if key in params or key in metrics or key in ABOUT:
            return key
    for key in SHORT.get(word, []):
        if key in metrics:
            return key
    ends = sorted(key for key in params | metrics if key.endswith((f".{word}", f"/{word}")))
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError(Fault(option, f"'{word}' is ambiguous", f"use one of {', '.join(ends)}"))
    if not metrics and (word in SHORT or "/" in word):
        raise ConfigError(_nothing_measured(option))
    known = [*(short for short, keys in SHORT.items() if metrics & set(keys)), *sorted(metrics), *sorted(params)]
    available = f"available: {', '.join(known[:NAMED])} … ({len(params)} parameters, {len(metrics)} metrics)"
    raise ConfigError(
        Fault(option, f"no run has the key '{word}'", synonyms.hint(word) or suggest(word, known) or available)
    )


def metric(word: str, results: Sequence[Result], option: str) -> str:
    """Like ``resolve``, for metrics only."""
    names = sorted({key for result in results for key in result.metrics})
    candidates = [word, *SHORT.get(word, []), *(name for name in names if name.endswith(f"/{word}"))]
    matches = list(dict.fromkeys(name for name in candidates if name in names))
    if matches and (len(matches) == 1 or matches[0] == word or word in SHORT):
        return matches[0]
    if not names:
        raise ConfigError(_nothing_measured(option))
    hint = suggest(word, [*names, *(short for short, keys in SHORT.items() if set(keys) & set(names))])
    available = f"available metrics: {', '.join(names)}"
    raise ConfigError(Fault(option, f"no run has the metric '{word}'", f"{hint} {available}".strip()))


def _nothing_measured(option: str) -> Fault:
    return Fault(option, "these runs have no metrics yet", "see their progress with python -m runner status")


def value(result: Result, key: str) -> Value:
    """The metric, parameter or field of a run with this key; None if the run has none."""
    if key in result.metrics:
        return result.metrics[key]
    if key in result.params:
        return result.params[key]
    return str(getattr(result, key)) if key in ABOUT else None


def number(value: Value) -> float | None:
    """The value as a finite number; None if it is not one."""
    try:
        parsed = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return parsed if math.isfinite(parsed) else None


def title(key: str, keys: Iterable[str] = ()) -> str:
    """The title of a column: the short name, unless it would mean several of ``keys``."""
    for short, metrics in SHORT.items():
        if key in metrics:
            return short if len(set(metrics) & set(keys)) < 2 else key
    return key


def text(key: str, value: Value) -> str:
    """A value as text, with the unit and the significant digits of its key; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        if key in pinned_weights.KEYS and pinned_weights.split(value)[1]:
            return nearest(Path(pinned_weights.split(value)[0]))
        is_long = len(value) > DIGITS and ("." in value or "e" in value) and FRACTION.fullmatch(value)
        return f"{float(value):.4g}" if is_long else value
    if key == SECONDS:
        return duration(value) if value >= 10 else f"{_digits(key, value)} s"
    return f"{_digits(key, value)} GiB" if key.endswith("gib") else _digits(key, value)


def shown(key: str, value: float) -> float:
    """The number that ``text`` shows."""
    if key == SECONDS and value >= 10:
        return float(int(value + 0.5) if value < 3600 else int(value + 0.5) // 60 * 60)
    return float(_digits(key, value))


def unit(key: str) -> str:
    """The unit of a metric; empty if it has none, or if it is not known."""
    units = {"gib": "GiB", "tokens_per_second": "tokens/s", "seconds": "s"}
    return next((unit for suffix, unit in units.items() if key.endswith(suffix)), "")


def _digits(key: str, value: float) -> str:
    if key == SECONDS:
        return f"{value:.2g}"
    if key.endswith(("loss", "perplexity")):
        return f"{value:.4f}"
    if key.endswith("gib"):
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
