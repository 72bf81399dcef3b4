"""What can be asked of runs and how it is written: short names of metrics, "did you mean", numbers and their digits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.errors import ConfigError, Fault, suggest
from runner.report.results import Result
from runner.terminal import duration
from runner.tracking.metrics_log import BEST, LOSS, SECONDS

SPEED, GPU_MEMORY, CPU_MEMORY = "train/tokens_per_second", "memory/peak_allocated_gib", "memory/peak_rss_gib"
SHORT = {"loss": [LOSS], "best": [BEST], "tokens/s": [SPEED], "memory": [GPU_MEMORY, CPU_MEMORY], "time": [SECONDS]}
"""Short name → the metrics it may mean; the first that a run has counts."""
MATTER = ("loss", "best", "tokens/s", "memory", "time")
"""The metrics that are shown unless others are asked for."""
ABOUT = ("run", "label", "status", "reason", "sweep", "folder", "mlflow_id")
"""What can be asked of a run besides its parameters and metrics."""
LARGER_IS_BETTER = (
    "accuracy", "per_second", "mfu", "reward", "margins", "f1",
    "/acc", "/acc_norm", "_match", "/pass@1", "/bleu", "/rouge1", "/rouge2", "/rougeL", "/mcc",
)  # fmt: skip
SMALLER_IS_BETTER = ("loss", "perplexity", "gib", "seconds", "data_wait_fraction")
"""Ends of names that say which way a metric gets better, whatever it is sorted by."""
OF_THE_MACHINE = ("per_second", "seconds", "gib", "mfu", "data_wait_fraction")
"""Ends of the names of what depends on the machine and on what else it does."""
FRACTION, DIGITS = re.compile(r"-?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE), 7
"""A number as a search writes it, and so many characters of it that are shown whole."""
NAMED = 12
"""Names that a message lists."""

Value = str | float | None


@dataclass(frozen=True)
class Goal:
    """A metric, or a parameter, and which way it gets better."""

    key: str
    is_larger_better: bool

    def cost(self, result: Result) -> float:
        """Small is good; infinite where the run has no such number."""
        found = number(value(result, self.key))
        return math.inf if found is None else -found if self.is_larger_better else found


def goal(text: str, results: Sequence[Result], option: str) -> Goal:
    """``KEY`` gets better the way its name says (accuracy and speed upwards, all else downwards); ``-KEY`` upwards,
    ``+KEY`` downwards.

    Raises:
        ConfigError: no run has it.
    """
    key = resolve(text.lstrip("+-"), results, option)
    return Goal(key, True) if text.startswith("-") else Goal(key, False) if text.startswith("+") else by_name(key)


def by_name(key: str) -> Goal:
    """Which way a key gets better, as its name says: what it does not know gets better downwards."""
    return Goal(key, key.endswith(LARGER_IS_BETTER))


def objective(results: Sequence[Result]) -> Goal | None:
    """What a search of these runs looked for, the first of several; None where they are not all of one."""
    wanted = {(r.params.get("search.objective", ""), r.params.get("search.direction", "")) for r in results}
    name, direction = map(_first, wanted.pop() if len(wanted) == 1 else ("", ""))
    is_known = any(name in result.metrics for result in results)
    return Goal(name, direction == "maximize") if is_known else None


def _first(text: str) -> str:
    """Of a list as it stands among the parameters: ``['eval/loss', 'train/tokens']``."""
    return text.strip("[]").partition(",")[0].strip("'\" ")


def rated(order: Goal) -> Goal:
    """What is the best, where runs are ordered so: a name that says which way is better is taken at its word."""
    return by_name(order.key) if order.key.endswith((*LARGER_IS_BETTER, *SMALLER_IS_BETTER)) else order


def resolve(word: str, results: Sequence[Result], option: str) -> str:
    """The key that a word means: whole, a short name, ``data/format``, or an end that only one key has (``r``).

    ``name`` is what the run is called, as ``label``: the key of that name in the configuration is mostly empty.

    Raises:
        ConfigError: none, or several.
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
        raise ConfigError(Fault(option, f"'{word}' may mean several things", f"write one of {', '.join(ends)}"))
    if not metrics and (word in SHORT or "/" in word):
        raise ConfigError(_nothing_measured(option))
    known = [*(short for short, keys in SHORT.items() if metrics & set(keys)), *sorted(metrics), *sorted(params)]
    some = f"there are {', '.join(known[:NAMED])} … ({len(params)} parameters, {len(metrics)} metrics)"
    raise ConfigError(Fault(option, f"no run has '{word}'", suggest(word, known) or some))


def metric(word: str, results: Sequence[Result], option: str) -> str:
    """``resolve`` for what has to be a metric."""
    names = sorted({key for result in results for key in result.metrics})
    candidates = [word, *SHORT.get(word, []), *(name for name in names if name.endswith(f"/{word}"))]
    found = list(dict.fromkeys(name for name in candidates if name in names))
    if word in found or (found and word in SHORT):
        return found[0]
    if len(found) == 1:
        return found[0]
    if not names:
        raise ConfigError(_nothing_measured(option))
    hint = suggest(word, [*names, *(short for short, keys in SHORT.items() if set(keys) & set(names))])
    there = f"metrics here: {', '.join(names)}"
    raise ConfigError(Fault(option, f"no run has the metric '{word}'", f"{hint} {there}".strip()))


def _nothing_measured(option: str) -> Fault:
    return Fault(option, "these runs have measured nothing yet", "python -m runner status shows how far they are")


def value(result: Result, key: str) -> Value:
    """What a run has under a key; None where it has nothing."""
    if key in result.metrics:
        return result.metrics[key]
    if key in result.params:
        return result.params[key]
    return str(getattr(result, key)) if key in ABOUT else None


def number(found: Value) -> float | None:
    """The number that a value is; None for a text, and for what is not finite."""
    try:
        read = float(found) if found is not None else math.nan
    except ValueError:
        return None
    return read if math.isfinite(read) else None


def title(key: str, keys: Iterable[str] = ()) -> str:
    """The head of a column: the short name, where it means this key alone among ``keys``."""
    for short, meant in SHORT.items():
        if key in meant:
            return short if len(set(meant) & set(keys)) < 2 else key
    return key


def text(key: str, found: Value) -> str:
    """A value with as many digits as say something; a dash where there is none."""
    if found is None:
        return "–"
    if isinstance(found, str):
        is_long = len(found) > DIGITS and ("." in found or "e" in found) and FRACTION.fullmatch(found)
        return f"{float(found):.4g}" if is_long else found
    if key == SECONDS:
        return duration(found) if found >= 10 else f"{found:.2g} s"
    if key.endswith(("loss", "perplexity")):
        return f"{found:.4f}"
    if key.endswith("gib"):
        return f"{found:.2f} GiB"
    return f"{found:.0f}" if abs(found) >= 1000 else f"{found:.4g}"
