"""Rows of any source: chosen by a condition, ordered, and with a system prompt.

``data.where``, ``data.order_by`` and ``data.system_prompt``. Columns inside of objects have names with dots:
``meta.score``.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from runner.config import condition
from runner.data.examples import Example, Format
from runner.errors import DataError, Fault, quoted, suggest

Row = Mapping[str, Any]
TYPECODES = {int: "q", float: "d"}
WHERE, ORDER_BY, SYSTEM_PROMPT = "data.where", "data.order_by", "data.system_prompt"
SHOWN = 20
"""Columns that a message lists."""


def value_of(row: Row, column: str) -> Any:
    """The value of a column; None if the row does not have it."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inside = row.get(first)
    return value_of(inside, rest) if rest and isinstance(inside, Mapping) else None


class Filter:
    """The condition ``data.where``."""

    def __init__(self, text: str) -> None:
        """Raises ConfigError if the text is no condition."""
        self.text = text
        self._unseen: set[str] = set()
        self._columns: dict[str, None] = {}
        self._holds = condition.parse(text, self._named, WHERE)

    def keeps(self, row: Row) -> bool:
        if self._unseen:
            self._columns |= dict.fromkeys(map(str, row))
            self._unseen -= {name for name in self._unseen if value_of(row, name) is not None}
        return self._holds(partial(_comparable, row))

    def refuse_unseen(self) -> None:
        """Refuse a column that none of the rows had.

        Raises:
            DataError: with the columns of the rows.
        """
        if name := min(self._unseen, default=""):
            columns = list(self._columns)
            remedy = f"{suggest(name, columns)} columns here: {', '.join(columns[:SHOWN])}".strip()
            raise DataError(Fault(WHERE, f"no row has the column '{name}'", remedy, self.text))

    def _named(self, column: str) -> str:
        self._unseen.add(column)
        return column


class Values:
    """The values of a column; integers or floats alone take eight bytes each, instead of the 32 of a list."""

    def __init__(self) -> None:
        self.content: list[Any] | array[Any] = []

    def append(self, value: Any) -> None:
        if not self.content and type(value) in TYPECODES:
            self.content = array(TYPECODES[type(value)])
        if isinstance(self.content, array) and self.content.typecode != TYPECODES.get(type(value)):
            self.content = list(self.content)
        try:
            self.content.append(value)
        except OverflowError:  # an integer of more than eight bytes
            self.content = [*self.content, value]


def ranks(values: Sequence[Any], order_by: str) -> np.ndarray:
    """The place of each row in the order of a column, (rows,) int64; equal values have equal places.

    ``order_by``: the column; with ``-`` in front, the largest value comes first.

    Raises:
        DataError: the values are not all numbers or all texts, or all of them are equal.
    """
    alone = [] if isinstance(values, array) else values
    is_number = [isinstance(value, int | float) and not isinstance(value, bool) for value in alone]
    if not all(is_number) and not all(isinstance(value, str) for value in alone):
        other = next(value for value, number in zip(alone, is_number, strict=True) if number != is_number[0])
        problem = f"has numbers and other values, such as {quoted(values[0])} and {quoted(other)}"
        raise DataError(Fault(ORDER_BY, problem, "order by a column of numbers, or of texts", order_by))
    different, places = np.unique(np.array(values), return_inverse=True)
    if len(different) < 2:
        raise DataError(Fault(ORDER_BY, "has no effect: all rows have the same value", "set it to null", order_by))
    return len(different) - 1 - places if order_by.startswith("-") else places


def order_value(row: Row, order_by: str) -> Any:
    """The value by which a row is ordered.

    Raises:
        DataError: the row has none, or one that has no order.
    """
    column = order_by.removeprefix("-")
    value = value_of(row, column)
    if not isinstance(value, int | float | str) or isinstance(value, bool) or value != value:
        problem = f"has no '{column}'" if value is None else f"has a '{column}' without an order: {quoted(value)}"
        other = "" if column in row else suggest(column, map(str, row))
        remedy = f"{other} a number or a text is needed, or leave the row out".strip()
        raise DataError(Fault(ORDER_BY, problem, remedy, order_by))
    return value


class WithSystemPrompt:
    """A format whose conversations begin with a system prompt, unless the row has its own."""

    def __init__(self, format_fn: Format, text: str) -> None:
        self._format, self._text = format_fn, text
        self.own = 0
        """How many rows had their own so far."""

    def __call__(self, row: Row) -> Example | None:
        example = self._format(row)
        if example is None:
            return None
        if isinstance(example, list):
            return self._before(example)
        key = "messages" if isinstance(example, dict) and "messages" in example else "prompt"
        if isinstance(example, str) or not isinstance(example[key], list):
            problem = "is plain text, which has no system prompt"
            raise DataError(Fault(SYSTEM_PROMPT, problem, "set it to null, or use rows with messages", self._text))
        turns = self._before(example[key])
        shown = {"shown": turns} if isinstance(example.get("shown"), list) else {}
        return {**example, key: turns, **shown}

    def _before(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if turns and turns[0]["role"] == "system":
            self.own += 1
            return turns
        return [{"role": "system", "content": self._text}, *turns]


def _comparable(row: Row, column: str) -> str | float | None:
    """The value of a column as conditions compare it: lists and objects as JSON."""
    value = value_of(row, column)
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, int | float | str | None) else json.dumps(value, default=str)
