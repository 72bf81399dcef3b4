"""Formats of preference data: each option turns one row into a prompt with a chosen and a rejected answer.

Those of other programs (``preference_alpaca`` …) read each side as a whole conversation, with the format of those.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from runner.config.schema import Text
from runner.data import conversation, formats, row_shape, training_keys
from runner.data.conversation import NO_OPTIONS, Message
from runner.data.examples import Example, chat
from runner.data.training_keys import Row, number
from runner.errors import DataError, Fault

TASK = "dpo"
"""The task that these rows fit."""


def preference(
    row: Row, *, prompt: Text, chosen: Text, rejected: Text, margin: Text, ignore: list[Text] | None = None
) -> Example:
    """Rows ``{prompt, chosen, rejected}``: each a text or a list of messages.

    Without a prompt, or where both begin with it, ``chosen`` and ``rejected`` are whole conversations, and the prompt
    is what they have in common.
    ``margin``: the key of a number, by how much the chosen answer is better; used by task=reward.
    ``ignore``: keys that change what is learnt and are left out all the same.
    """
    left_out = ignore or []
    row_shape.refuse_richer(row, "preference")
    training_keys.refuse_unused(row, [], {prompt, chosen, rejected, *training_keys.OPTIONS}, ignore=left_out)
    options = conversation.template_options(row, left_out)
    read = functools.partial(row_shape.text_or_messages, row, "preference", ignore=left_out)
    sides = [read(name, key, "assistant") for name, key in (("chosen", chosen), ("rejected", rejected))]
    if margin not in left_out and row.get(margin) not in (None, ""):
        options["margin"] = _margin(row[margin], margin)
    start = read("prompt", prompt, "user") if row.get(prompt) is not None else []
    whole = all(side[: len(start)] == start and len(side) > len(start) for side in sides)
    if start and not whole:
        return pair(start, sides[0], sides[1], options)
    if isinstance(row[chosen], str):
        problem = f"has no prompt under '{prompt}', and '{chosen}' is a text, not a conversation that contains it"
        raise DataError(
            Fault("", problem, "name its key with data.format.prompt, or split the text: data/format=custom")
        )
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    return pair(sides[0][:shared], sides[0][shared:], sides[1][shared:], options)


def like_preference(row: Row, *, prompt: str, chosen: str, rejected: str, **_: object) -> int:
    return row_shape.has(row, prompt, chosen, rejected) or row_shape.has(row, chosen, rejected)


def preference_alpaca(
    row: Row,
    *,
    instruction: Text,
    input: Text,
    chosen: Text,
    rejected: Text,
    system: Text | None,
    ignore: list[Text] | None = None,
) -> Example:
    """An instruction with an optional input, and two answers."""
    row_shape.needs(row, "preference_alpaca", instruction=instruction, chosen=chosen, rejected=rejected)
    read = functools.partial(formats.alpaca, instruction=instruction, input=input, system=system, ignore=ignore)
    rows = [{key: value for key, value in row.items() if key != other} for other in (rejected, chosen)]
    return _sides(read(rows[0], output=chosen), read(rows[1], output=rejected))


def like_preference_alpaca(row: Row, *, instruction: str, chosen: str, rejected: str, **_: object) -> int:
    return row_shape.has(row, instruction, chosen, rejected)


def preference_sharegpt(
    row: Row,
    *,
    conversations: Text,
    speaker: Text,
    value: Text,
    roles: dict[str, Text],
    chosen: Text,
    rejected: Text,
    system: Text | None,
    ignore: list[Text] | None = None,
) -> Example:
    """A list of ``{"from": "human", "value": …}`` as prompt, and two such answers beside it (LLaMA-Factory)."""
    row_shape.needs(row, "preference_sharegpt", conversations=conversations, chosen=chosen, rejected=rejected)
    keys: dict[str, Any] = {"conversations": conversations, "speaker": speaker, "value": value}
    rows = [_with(row, conversations, row[conversations], row[key], chosen, rejected) for key in (chosen, rejected)]
    return _sides(*(formats.sharegpt(each, **keys, roles=roles, system=system, ignore=ignore) for each in rows))


def like_preference_sharegpt(row: Row, *, conversations: str, chosen: str, rejected: str, **_: object) -> int:
    return row_shape.has(row, conversations, chosen, rejected)


def preference_swift(
    row: Row, *, messages: Text, rejected_response: Text, rejected_messages: Text, ignore: list[Text] | None = None
) -> Example:
    """A conversation that ends with the chosen answer, and a rejected answer or conversation (ms-swift)."""
    row_shape.needs(row, "preference_swift", messages=messages)
    whole = row.get(rejected_messages)
    if whole is None:
        row_shape.needs(row, "preference_swift", rejected_response=rejected_response)
        answer = {"role": "assistant", "content": row[rejected_response]}
        whole = [*row[messages][:-1], answer] if isinstance(row[messages], list) else None
    rest = {key: value for key, value in row.items() if key not in (rejected_response, rejected_messages)}
    return _sides(*(_conversation({**rest, messages: turns}, messages, ignore) for turns in (row[messages], whole)))


def like_preference_swift(
    row: Row, *, messages: str, rejected_response: str, rejected_messages: str, **_: object
) -> int:
    return row_shape.has(row, messages, rejected_response) or row_shape.has(row, messages, rejected_messages)


def preference_openai(
    row: Row, *, input: Text, chosen: Text, rejected: Text, ignore: list[Text] | None = None
) -> Example:
    """``{"input": {"messages"}, "preferred_output": […], "non_preferred_output": […]}``, as OpenAI's API takes them."""
    row_shape.needs(row, "preference_openai", input=input, chosen=chosen, rejected=rejected)
    inner = row[input]
    if not isinstance(inner, Mapping) or not isinstance(inner.get("messages"), list):
        problem = f"needs an object with messages under '{input}'"
        raise row_shape.misfit(row, "preference_openai", "input", input, problem)
    rest = {**{key: value for key, value in row.items() if key != input}, **inner}
    rows = [_with(rest, "messages", inner.get("messages"), row[key], chosen, rejected) for key in (chosen, rejected)]
    return _sides(*(_conversation(each, "messages", ignore) for each in rows))


def like_preference_openai(row: Row, *, input: str, chosen: str, rejected: str, **_: object) -> int:
    return row_shape.has(row, input, chosen, rejected)


def preference_llamafactory(row: Row, *, chosen: Text, rejected: Text, ignore: list[Text] | None = None) -> Example:
    """Two conversations that differ in their last answer (LLaMA-Factory's v1)."""
    row_shape.needs(row, "preference_llamafactory", chosen=chosen, rejected=rejected)
    rest = {key: value for key, value in row.items() if key not in (chosen, rejected)}
    return _sides(*(_conversation({**rest, key: row[key]}, key, ignore) for key in (chosen, rejected)))


def like_preference_llamafactory(row: Row, *, chosen: str, rejected: str, **_: object) -> int:
    return row_shape.has(row, chosen, rejected)


def _conversation(row: Row, key: str, ignore: list[str] | None) -> Example:
    return formats.messages(row, messages=key, role="role", content="content", ignore=ignore)


def _with(row: Row, key: str, turns: object, answer: object, *without: str) -> Row:
    """The row whose conversation under ``key`` is these turns and the answer: one turn, or a list of turns."""
    rest = {name: value for name, value in row.items() if name not in without}
    more = answer if isinstance(answer, list) else [answer]
    return {**rest, key: [*turns, *more] if isinstance(turns, list) else turns}


def _sides(chosen: Example, rejected: Example) -> Example:
    """The example of two conversations that differ in their last answer."""
    first, second = chat(chosen), chat(rejected)
    assert first is not None
    assert second is not None
    if first.messages[:-1] != second.messages[:-1]:
        raise DataError(Fault("", "the chosen and the rejected side have different prompts", "leave the row out"))
    return pair(first.messages[:-1], first.messages[-1:], second.messages[-1:], conversation.without_weight(chosen))


def _margin(value: object, key: str) -> float:
    if (parsed := number(value)) is None:
        raise DataError(Fault("", f"the margin under '{key}' is not a finite number", "correct the row", value))
    return parsed


def pair(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], options: Mapping[str, Any] = NO_OPTIONS
) -> Example:
    """The example of a preference row; each side must be one answer of the assistant. ``options``: its tools, …

    Raises:
        DataError: a side is something else, the prompt is empty, or both sides are equal.
    """
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        conversation.one_answer(side, f"{name} side", "common turns")
    conversation.refuse_empty(prompt)
    if chosen == rejected:
        raise DataError(Fault("", "the chosen and the rejected answer are equal", "leave the row out"))
    for side in (chosen, rejected):
        conversation.checked([*prompt, *side])
    return {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0], **options}
