"""Formats of single answers with a verdict: each option turns one row into a prompt, an answer and a label."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from runner.config.schema import Text
from runner.data import conversation, formats, row_shape, training_keys
from runner.data.conversation import NO_OPTIONS, Message
from runner.data.examples import Example, chat
from runner.data.training_keys import Row
from runner.errors import DataError, Fault, quoted

TASK = "kto"
"""The task that these rows fit."""

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def kto(row: Row, *, prompt: Text, completion: Text, label: Text, ignore: list[Text] | None = None) -> Example:
    """Rows ``{prompt, completion, label}``: prompt and completion a text or a list of messages, label true or false.

    ``ignore``: keys that change what is learnt and are left out all the same.
    """
    left_out = ignore or []
    row_shape.needs(row, "kto", prompt=prompt, completion=completion, label=label)
    training_keys.refuse_unused(row, [], {prompt, completion, label, *training_keys.OPTIONS}, ignore=left_out)
    options = conversation.template_options(row, left_out)
    read = functools.partial(row_shape.text_or_messages, row, "kto", ignore=left_out)
    return judged(read("prompt", prompt, "user"), read("completion", completion, "assistant"), row.get(label), options)


def like_kto(row: Row, *, prompt: str, completion: str, label: str, **_: object) -> int:
    return row_shape.has(row, prompt, completion, label)


def kto_messages(
    row: Row, *, messages: Text, role: Text, content: Text, label: Text, ignore: list[Text] | None = None
) -> Example:
    """A conversation whose last answer is judged by a label beside it (TRL, ms-swift)."""
    row_shape.needs(row, "kto_messages", messages=messages, label=label)
    left_out = [*(ignore or []), label]
    return _last(formats.messages(row, messages=messages, role=role, content=content, ignore=left_out), row[label])


def like_kto_messages(row: Row, *, messages: str, label: str, **_: object) -> int:
    is_verdict = isinstance(row.get(label), bool)
    return row_shape.has(row, messages, label) + 1 if is_verdict and messages in row else 0


def kto_sharegpt(
    row: Row,
    *,
    conversations: Text,
    speaker: Text,
    value: Text,
    roles: dict[str, Text],
    label: Text,
    system: Text | None,
    ignore: list[Text] | None = None,
) -> Example:
    """A list of ``{"from": "human", "value": …}`` whose last answer is judged by ``kto_tag`` (LLaMA-Factory)."""
    row_shape.needs(row, "kto_sharegpt", conversations=conversations, label=label)
    keys: dict[str, Any] = {"conversations": conversations, "speaker": speaker, "value": value}
    left_out = [*(ignore or []), label]
    return _last(formats.sharegpt(row, **keys, roles=roles, system=system, ignore=left_out), row[label])


def like_kto_sharegpt(row: Row, *, conversations: str, label: str, **_: object) -> int:
    return row_shape.has(row, conversations, label)


def _last(example: Example, label: object) -> Example:
    """The example of a conversation with a verdict on its last answer."""
    talk = chat(example)
    assert talk is not None
    return judged(talk.messages[:-1], talk.messages[-1:], label, conversation.without_weight(example))


def judged(
    prompt: list[Message], completion: list[Message], label: object, options: Mapping[str, Any] = NO_OPTIONS
) -> Example:
    """The example of a row with one answer and whether it is desirable. ``options``: its tools, …

    Raises:
        DataError: the answer is something else, the prompt is empty, or the label is not true or false.
    """
    value = LABELS.get(str(label).strip().lower())
    if value is None:
        problem = f"the label is {quoted(label)}; allowed: true (desirable), false (undesirable)"
        raise DataError(Fault("", problem, "correct the row; data.format.label names the key"))
    answer = conversation.one_answer(completion, "completion", "first turns")
    conversation.refuse_empty(prompt)
    conversation.checked([*prompt, answer])
    return {"prompt": prompt, "completion": answer, "label": value, **options}
