"""The format of prompts without answers: the model writes these itself, and reward functions score them."""

from __future__ import annotations

import json

from runner.config.schema import Text
from runner.data import conversation, row_shape, training_keys
from runner.data.examples import Example
from runner.data.training_keys import Row
from runner.errors import DataError, Fault, quoted

TASK = "grpo"
"""The task that these rows fit."""
UNUSED = (
    "tools",
    "functions",
    "chat_template_kwargs",
    *training_keys.MEDIA,
    *training_keys.WEIGHTS,
    *training_keys.SYSTEM,
)
"""Columns that would change the prompt, or how much it is trained."""
ARGUMENTS = ("prompts", "completions", "completion_ids")
"""What reward functions get beside the columns."""


def prompts(row: Row, *, prompt: Text, messages: Text, answer: Text, ignore: list[Text] | None = None) -> Example:
    """Rows ``{prompt, …}`` or ``{messages, …}``: a text or a list of messages; other columns go to the rewards.

    ``answer``: the column with the right answer, if there is one; it is shown beside the model's.
    ``ignore``: keys that change what is learnt and are only given to the reward functions all the same.
    """
    training_keys.refuse_unused(row, [], (), words=UNUSED, ignore=ignore or [])
    key, parameter = (prompt, "prompt") if row.get(prompt) is not None else (messages, "messages")
    turns = row_shape.text_or_messages(row, "prompts", parameter, key, "user", ignore=[])
    if not turns or turns[-1]["role"] == "assistant":
        problem = "the prompt ends with an answer" if turns else "the prompt is empty"
        raise DataError(Fault("", problem, "leave the last answer out: the model writes it"))
    conversation.refuse_empty(turns)
    conversation.checked([*turns, conversation.message_of("assistant", "an answer", "the answer")])
    columns = {name: value for name, value in row.items() if name != key}
    if taken := columns.keys() & {*ARGUMENTS}:
        problem = f"has a column {quoted(min(taken))}, but reward functions get their own argument of that name"
        raise DataError(Fault("", problem, "rename the column"))
    try:
        json.dumps(columns)
    except (TypeError, ValueError) as error:
        problem = f"a column cannot be kept for the reward functions: {error}"
        raise DataError(Fault("", problem, "write it as text or a number")) from error
    shown = row[key] if isinstance(row[key], str) else turns
    return {"prompt": turns, "shown": shown, "columns": columns, "answer": row.get(answer)}


def like_prompts(row: Row, *, prompt: str, **_: object) -> int:
    return row_shape.has(row, prompt)
