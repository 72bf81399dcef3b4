"""Formats of preference data: each option turns one row into a prompt with a chosen and a rejected answer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from runner.config.schema import Text
from runner.data import conversation, row_shape
from runner.data.conversation import NO_OPTIONS, Message, Row
from runner.data.examples import Example
from runner.errors import DataError, Fault


def preference(row: Row, *, prompt: Text, chosen: Text, rejected: Text, ignore: list[Text] | None = None) -> Example:
    """Rows ``{prompt, chosen, rejected}``: each a text or a list of messages.

    Without a prompt, ``chosen`` and ``rejected`` are whole conversations, and the prompt is what they have in common.
    ``ignore``: keys that change what is learnt and are left out all the same.
    """
    left_out = ignore or []
    conversation.refuse_unused(row, [], {prompt, chosen, rejected, *conversation.OPTIONS}, ignore=left_out)
    options = conversation.template_options(row, left_out)
    read = functools.partial(row_shape.text_or_messages, row, "preference", ignore=left_out)
    sides = [read(name, key, "assistant") for name, key in (("chosen", chosen), ("rejected", rejected))]
    if row.get(prompt) is not None:
        return pair(read("prompt", prompt, "user"), sides[0], sides[1], options)
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    return pair(sides[0][:shared], sides[0][shared:], sides[1][shared:], options)


def like_preference(row: Row, *, prompt: str, chosen: str, rejected: str, **_: object) -> int:
    return row_shape.has(row, prompt, chosen, rejected) or row_shape.has(row, chosen, rejected)


def pair(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], options: Mapping[str, Any] = NO_OPTIONS
) -> Example:
    """The example of a preference row; each side must be one answer of the assistant. ``options``: its tools, …

    Raises:
        DataError: a side is something else, the prompt is empty, or both sides are equal.
    """
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side) or "nothing"
            problem = f"the {name} side must be one answer of the assistant, it is: {roles}"
            raise DataError(Fault("", problem, "leave the row out, or move the common turns into the prompt"))
    if not prompt:
        raise DataError(Fault("", "the prompt is empty", "leave the row out"))
    if chosen == rejected:
        raise DataError(Fault("", "the chosen and the rejected answer are equal", "leave the row out"))
    for side in (chosen, rejected):
        conversation.checked([*prompt, *side])
    return {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0], **options}
