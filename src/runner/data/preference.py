"""Formats of preference data: each option turns one row into a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.data import formats
from runner.data.examples import Example
from runner.data.formats import Message, Row
from runner.errors import DataError, Fault

NEEDED = "a preference row has a prompt, a chosen and a rejected answer"


def preference(row: Row, *, prompt: str, chosen: str, rejected: str) -> Example:
    """Rows ``{prompt, chosen, rejected}``: each a text or a list of messages.

    Without a prompt, ``chosen`` and ``rejected`` are whole conversations, and the prompt is what they have in common.
    """
    sides = [_messages(row, key, "assistant") for key in (chosen, rejected)]
    if row.get(prompt) is not None:
        return pair(_messages(row, prompt, "user"), *sides)
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    return pair(sides[0][:shared], sides[0][shared:], sides[1][shared:])


def pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Example:
    """The example of a preference row; each side must be one answer of the assistant.

    Raises:
        DataError: a side is something else, the prompt is empty, or both sides are equal.
    """
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side) or "nothing"
            problem = f"the {name} side must be one answer of the assistant, it is: {roles}"
            raise DataError(Fault("", problem, "leave the row out, or move the common turns into the prompt"))
    if not prompt:
        raise DataError(Fault("", "the prompt is empty", NEEDED))
    if chosen == rejected:
        raise DataError(Fault("", "the chosen and the rejected answer are equal", "leave the row out"))
    for side in (chosen, rejected):
        formats.checked_conversation([*prompt, *side])
    return {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}


def _messages(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    """The messages under a key; a text is one message of ``role``."""
    value = row.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        return [formats.message(turn) for turn in value]
    kind = type(value).__name__ if key in row else f"nothing (keys here: {', '.join(map(str, row)) or 'none'})"
    remedy = f"{NEEDED}; data.format.{{prompt,chosen,rejected}}=KEY names the columns"
    raise DataError(Fault("data.format", f"needs a text or a list of messages under '{key}', and finds {kind}", remedy))
