"""Formats of preference data: each option turns one row into a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from runner.config.schema import Text
from runner.data import conversation
from runner.data.conversation import Message, Row
from runner.data.examples import Example
from runner.errors import DataError, Fault

NEEDED = "a preference row has a prompt, a chosen and a rejected answer"


def preference(row: Row, *, prompt: Text, chosen: Text, rejected: Text, ignore: list[Text] | None = None) -> Example:
    """Rows ``{prompt, chosen, rejected}``: each a text or a list of messages.

    Without a prompt, ``chosen`` and ``rejected`` are whole conversations, and the prompt is what they have in common.
    ``ignore``: keys that change what is learnt and are left out all the same.
    """
    left_out = ignore or []
    conversation.refuse_unused(row, [], {prompt, chosen, rejected}, ignore=left_out)
    sides = [_messages(row, key, "assistant", left_out) for key in (chosen, rejected)]
    if row.get(prompt) is not None:
        return pair(_messages(row, prompt, "user", left_out), *sides)
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
        conversation.checked([*prompt, *side])
    return {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}


def _messages(row: Row, key: str, role: str, ignore: list[str]) -> list[Message]:
    """The messages under a key; a text is one message of ``role``."""
    value = row.get(key)
    if isinstance(value, str):
        return [conversation.said(role, value, f"the text under '{key}'")]
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        conversation.refuse_unused({}, value, set(), keys={"role", "content"}, ignore=ignore)
        return conversation.read(value, "role", "content", ignore)
    kind = type(value).__name__ if key in row else f"nothing (keys here: {', '.join(map(str, row)) or 'none'})"
    remedy = f"{NEEDED}; data.format.prompt, .chosen and .rejected name the columns"
    raise DataError(Fault("data.format", f"needs a text or a list of messages under '{key}', and finds {kind}", remedy))
