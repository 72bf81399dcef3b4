"""Reward functions: plain Python functions of the user's that score answers, called with a time limit.

``f(prompts, completions, completion_ids, **columns) -> list[float | None]``: TRL's signature. Prompts and completions
are texts, or lists of messages where the row has messages; columns are the other columns of the rows; None: not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.config import user_function
from runner.errors import DataError, Fault, RunnerError, quoted
from runner.signals import time_limit

KEY = "task.rewards"
AGAIN_S = 1.0
"""A function that catches the end of its time is interrupted again after this time."""


class _TimeIsOver(BaseException):
    """Not an Exception: functions that catch every Exception must end, too."""


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a task."""

    references: list[str]
    """``file.py:name`` of each function."""
    code: tuple[str, ...]
    """Where the user's code is."""
    weights: list[float]
    timeout_s: float
    key: str = KEY
    """The key that names the functions."""
    timeout_key: str = "task.reward_timeout_s"

    @property
    def names(self) -> list[str]:
        return [reference.rpartition(":")[2] for reference in self.references]

    def of(
        self, prompts: list[Any], completions: list[Any], ids: list[list[int]], columns: dict[str, Any]
    ) -> np.ndarray:
        """The rewards of each answer, (answers, functions) float64; NaN: not scored.

        Raises:
            ConfigError: a function cannot be imported.
            DataError: a function raises, needs too long, or returns something else than one number for each answer.
        """
        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": ids}
        scores = [self._called(reference, given, len(prompts)) for reference in self.references]
        return np.array(scores, dtype=np.float64).T

    def total(self, scores: np.ndarray) -> np.ndarray:
        """The weighted sum of each answer (answers,); NaN if no function has scored it."""
        total = np.nansum(scores * np.array(self.weights), axis=1)
        return np.where(np.isnan(scores).all(axis=1), np.nan, total)

    def _called(self, reference: str, given: dict[str, Any], count: int) -> list[float]:
        function: Callable[..., Any] = user_function.load(self.key, reference, self.code)
        try:
            with time_limit(self.timeout_s, _TimeIsOver, AGAIN_S):
                result = function(**given)
        except RunnerError:
            raise
        except _TimeIsOver:
            problem = f"{reference} was not done after {self.timeout_s:g} s with {count} answers"
            raise DataError(Fault(self.key, problem, f"make it faster, or raise {self.timeout_key}")) from None
        except (Exception, SystemExit) as error:
            problem = f"{reference} failed: {type(error).__name__}: {error}{user_function.place_of(error)}"
            raise DataError(Fault(self.key, problem, "correct the function; None means: not scored")) from error
        return list(_numbers(self.key, reference, result, count))


def _numbers(key: str, reference: str, result: Any, count: int) -> Iterator[float]:
    """The numbers that a function has returned, NaN for None."""
    if not isinstance(result, Sequence | np.ndarray) and not hasattr(result, "tolist"):
        problem = f"{reference} returned {type(result).__name__}, not a list of numbers"
        raise DataError(Fault(key, problem, "return one number, or None, for each answer"))
    values = result.tolist() if hasattr(result, "tolist") else list(result)
    if len(values) != count:
        problem = f"{reference} returned {len(values)} numbers for {count} answers"
        raise DataError(Fault(key, problem, "return one number, or None, for each answer"))
    for number, value in enumerate(values, start=1):
        score = math.nan if value is None else _number(value)
        if score is None or (value is not None and not math.isfinite(score)):
            problem = f"{reference} returned {quoted(value)} for answer {number}"
            raise DataError(Fault(key, problem, "return a finite number; None means: not scored"))
        yield score


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    return float(value) if isinstance(value, int | float) else None
