"""The shape of a row: read what a format needs of it, and name the format that a row looks like.

A format declares its rows by a companion function beside it, ``like_<option>(row, **values)``, with the values of its
YAML file: how many keys of the row the format would use, 0 if the row is none of its own.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from runner.config import bind
from runner.data import conversation, training_keys
from runner.data.conversation import Message
from runner.data.training_keys import Row
from runner.errors import DataError, Fault

WRITTEN_LIST = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
"""The beginning of messages that JSON or Python has written into a cell of a table."""


def looks_like(row: Row) -> str | None:
    """The format that would use most keys of this row, as ``data/format=`` takes it; None if no format is like it."""
    used = {name: like(row) for name, like in _companions().items()}
    name = max(used, key=lambda name: used[name])
    return name if used[name] else None


@functools.cache
def _companions() -> dict[str, Callable[[Row], int]]:
    """Format → its ``like_`` companion, for every format that has one."""
    names = sorted(path.stem for path in (bind.config_dir() / "data/format").glob("*.yaml"))
    nodes = {name: bind.option("data/format", name) for name in names}
    return {name: like for name, node in nodes.items() if (like := bind.bound_companion("like", node))}


@functools.cache
def _tasks() -> dict[str, str]:
    """Format → the task that its rows fit, for the formats whose module names one (``TASK``)."""
    targets = {name: bind.option("data/format", name)[bind.TARGET] for name in _companions()}
    modules = {name: importlib.import_module(target.rpartition(".")[0]) for name, target in targets.items()}
    return {name: module.TASK for name, module in modules.items() if hasattr(module, "TASK")}


def has(row: Row, *keys: str) -> int:
    """The number of these keys if the row has them all, else 0: for a ``like_`` companion."""
    return len(keys) if all(key in row for key in keys) else 0


def has_turns(row: Row, role: str, content: str) -> int:
    """1 if a key of the row holds a list whose first turn has both keys, else 0: for a ``like_`` companion."""
    firsts = (value[0] for value in row.values() if isinstance(value, list) and value)
    return int(any(is_turn(first, (role, content)) for first in firsts))


def is_turn(value: object, keys: tuple[str, str]) -> bool:
    return conversation.is_turn(value, *keys)


def needs(row: Row, name: str, **keys: str) -> None:
    """Check that the row has these keys of the format ``name``: parameter → key; errors as for ``text``."""
    for parameter, key in keys.items():
        if row.get(key) is None:
            raise misfit(row, name, parameter, key)


def refuse_richer(row: Row, name: str) -> None:
    """Refuse a row of pairs that another format than ``name`` would use more of."""
    pairs = row.keys() & {"chosen", "rejected", "rejected_response", "rejected_messages"}
    if pairs and looks_like(row) not in (name, None):
        raise misfit(
            row, name, "chosen", min(pairs), f"uses {', '.join(map(repr, sorted(pairs)))} otherwise or not at all"
        )


def text(row: Row, name: str, parameter: str, key: str) -> str:
    """The text under ``key``, which ``parameter`` of the format ``name`` names.

    Raises:
        DataError: there is none, with the format that the row looks like.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise misfit(row, name, parameter, key)
    return conversation.text_of(value, f"the text under '{key}'")


def turns(row: Row, name: str, parameter: str, key: str, needed: tuple[str, str]) -> list[Mapping[str, Any]]:
    """The list of turns under ``key``, each with the ``needed`` keys; errors as for ``text``."""
    value = row.get(key)
    if not isinstance(value, list):
        raise misfit(row, name, parameter, key)
    for number, turn in enumerate(value, start=1):
        if not is_turn(turn, needed):
            present = ", ".join(map(str, turn)) if isinstance(turn, Mapping) else type(turn).__name__
            raise misfit(row, name, parameter, key, f"message {number} needs {' and '.join(needed)}, it has {present}")
    return value


def text_or_messages(row: Row, name: str, parameter: str, key: str, role: str, ignore: list[str]) -> list[Message]:
    """The messages under ``key``: a list of messages, or a text, which is one message of ``role``."""
    if isinstance(row.get(key), list):
        listed = turns(row, name, parameter, key, ("role", "content"))
        training_keys.refuse_unused({}, listed, (), keys={"role", "content"}, ignore=ignore)
        return conversation.read(listed, "role", "content", ignore)
    value = text(row, name, parameter, key)
    if WRITTEN_LIST.match(value):
        problem = f"the text under '{key}' is a list of messages, written as text"
        raise DataError(Fault("", problem, "write a list, in a jsonl or parquet file"))
    return [conversation.message_of(role, value, f"the {parameter}")]


def misfit(row: Row, name: str, parameter: str, key: str, problem: str = "") -> DataError:
    """The error of a row that is not of the format ``name``."""
    kind = type(row[key]).__name__ if key in row else f"nothing (keys here: {', '.join(map(str, row)) or 'none'})"
    problem = problem or f"finds {kind} under '{key}'"
    near = looks_like(row)
    if near is not None and near != name:
        task = f" task={fits}" if (fits := _tasks().get(near)) else ""
        return DataError(
            Fault("data/format", f"{problem}. The row looks like {near}", f"data/format={near}{task}", name)
        )
    remedy = f"name its key with data.format.{parameter}=KEY, or read the rows with a function: data/format=custom"
    return DataError(Fault("data/format", problem, remedy, name))
