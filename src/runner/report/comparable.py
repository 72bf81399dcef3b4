"""Checks before a comparison: at least one run is completed, and all runs are of one task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from runner.errors import ConfigError, Fault
from runner.report import columns
from runner.report.results import Result

SHOWN = 8
"""Number of values, or runs, that a message lists."""


def refuse_nothing(kept: Sequence[Result], results: Sequence[Result], where: str, keys: Sequence[str]) -> None:
    """Refuse an empty comparison. ``kept``: the runs that match ``where``; ``keys``: the keys in this condition."""
    if not kept:
        if not where:
            raise ConfigError(Fault("", "there are no runs to compare"))
        values = "; ".join(_values_of(key, results) for key in dict.fromkeys(keys))
        problem = f"none of the {len(results)} runs matches this condition"
        raise ConfigError(Fault("--where", problem, f"existing values: {values}", where))
    if any(result.is_completed for result in kept):
        return
    counts = ", ".join(f"{n} {status}" for status, n in Counter(result.status for result in kept).items())
    runs = f"none of the {len(kept)} runs is completed" if len(kept) > 1 else f"{kept[0].label} is not completed"
    lines = "".join(f"\n      {_progress(result)}" for result in kept[:SHOWN])
    raise ConfigError(Fault("", f"{runs}: {counts}", f"see their progress with python -m runner status{lines}"))


def refuse_mixed(kept: Sequence[Result]) -> None:
    """Refuse to compare runs of different tasks (sft, pretrain)."""
    tasks = Counter(result.params["task"] for result in kept if "task" in result.params)
    if len(tasks) > 1:
        counts = ", ".join(f"{n} of {task}" for task, n in tasks.items())
        problem = f"these are runs of different tasks ({counts}): their losses cannot be compared"
        raise ConfigError(Fault("task", problem, f"choose one task: --where task={tasks.most_common(1)[0][0]}"))


def _values_of(key: str, results: Sequence[Result]) -> str:
    """The values of a key, ``quant: 4bit, 8bit``; for many numbers the range, ``lora.r: 4 to 64``."""
    values = {value for result in results if (value := columns.value(result, key)) is not None}
    numbers = sorted(number for value in values if (number := columns.number(value)) is not None)
    if len(numbers) == len(values) > SHOWN:
        return f"{key}: {numbers[0]:.6g} to {numbers[-1]:.6g}"
    texts = sorted(columns.text(key, value) for value in values)
    return f"{key}: {', '.join(texts[:SHOWN])}{' …' if len(texts) > SHOWN else ''}"


def _progress(result: Result) -> str:
    step = f"  step {result.step}/{result.total_steps}" if result.total_steps else ""
    return f"{result.run}  {result.status}{step}" + (f"  {result.reason}" if result.reason else "")
