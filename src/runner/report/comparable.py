"""Which runs may stand on one board: some of them completed, all of one task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from runner.errors import ConfigError, Fault
from runner.report import columns
from runner.report.results import Result

SHOWN = 8
"""Values, and runs, that a message lists."""


def refuse_nothing(kept: Sequence[Result], results: Sequence[Result], where: str, asked: Sequence[str]) -> None:
    """Refuse where no run is left of ``results``, or none of those is completed.

    Args:
        where: the condition that they had to meet.
        asked: the keys in it; what values these have is said.

    Raises:
        ConfigError: with what there is.
    """
    if not kept:
        if not where:
            raise ConfigError(Fault("", "there is no run to compare"))
        there = "; ".join(_values_of(key, results) for key in dict.fromkeys(asked))
        raise ConfigError(Fault("--where", f"none of the {len(results)} runs meets it", f"there is {there}", where))
    if any(result.is_completed for result in kept):
        return
    counts = ", ".join(f"{n} {status}" for status, n in Counter(result.status for result in kept).items())
    runs = f"none of the {len(kept)} runs is completed" if len(kept) > 1 else f"{kept[0].label} is not completed"
    lines = "".join(f"\n      {_standing(result)}" for result in kept[:SHOWN])
    raise ConfigError(Fault("", f"{runs}: {counts}", f"python -m runner status shows how far they are{lines}"))


def refuse_mixed(kept: Sequence[Result]) -> None:
    """Refuse runs of several tasks.

    Raises:
        ConfigError: with how to choose those of one.
    """
    tasks = Counter(result.params["task"] for result in kept if "task" in result.params)
    if len(tasks) > 1:
        counts = ", ".join(f"{n} of {task}" for task, n in tasks.items())
        problem = f"these are runs of different tasks ({counts}): their losses are not of one kind"
        raise ConfigError(Fault("task", problem, f"choose one: --where task={tasks.most_common(1)[0][0]}"))


def _values_of(key: str, results: Sequence[Result]) -> str:
    """``quant: 4bit, 8bit``, or of many numbers the ends."""
    found = {value for result in results if (value := columns.value(result, key)) is not None}
    numbers = sorted(number for value in found if (number := columns.number(value)) is not None)
    if len(numbers) == len(found) > SHOWN:
        return f"{key}: {numbers[0]:.6g} to {numbers[-1]:.6g}"
    texts = sorted(columns.text(key, value) for value in found)
    return f"{key}: {', '.join(texts[:SHOWN])}{' …' if len(texts) > SHOWN else ''}"


def _standing(result: Result) -> str:
    step = f"  step {result.step}/{result.total_steps}" if result.total_steps else ""
    return f"{result.run}  {result.status}{step}" + (f"  {result.reason}" if result.reason else "")
