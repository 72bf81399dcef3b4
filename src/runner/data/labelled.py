"""The format of rows with a label: a text or a conversation, and its class, its classes, or a number."""

from __future__ import annotations

from runner.config.schema import Text
from runner.data import conversation, row_shape, training_keys
from runner.data.examples import Example
from runner.data.training_keys import Row
from runner.errors import DataError, Fault

TASK = "classify"
"""The task that these rows fit."""
SECOND_TEXTS = ("text_pair", "text2", "sentence2", "question2", "hypothesis")
"""Keys of a second text that the label is about, too."""
NEEDED = "a row has a text, a prompt or messages; data.format.text, .prompt and .messages name the keys"


def label(
    row: Row, *, text: Text, prompt: Text, messages: Text, label: Text, ignore: list[Text] | None = None
) -> Example:
    """Rows ``{text | prompt | messages, label}``; the text of a prompt is a message of the user.

    ``ignore``: keys that change what is learnt and are left out all the same.
    """
    names = {"text": text, "prompt": prompt, "messages": messages}
    used = {name: key for name, key in names.items() if row.get(key) is not None}
    if row.get(label) is None or not used:
        raise row_shape.misfit(row, "label", "label" if used else "text", label if used else text)
    if len(used) > 1:
        raise DataError(Fault("data.format", f"has several texts: {', '.join(used.values())}", NEEDED))
    ((name, key),), left_out = used.items(), ignore or []
    words = (*training_keys.ROW_WORDS, *SECOND_TEXTS)
    training_keys.refuse_unused(row, (), {key, label, *training_keys.OPTIONS}, ignore=left_out, words=words)
    if name == "text":
        content = row_shape.text(row, "label", name, key)
        if not content.strip():
            raise DataError(Fault("", f"the text under '{key}' is empty", "leave the row out"))
        return {"prompt": content, "label": row[label]}
    turns = row_shape.text_or_messages(row, "label", name, key, "user", left_out)
    conversation.check_roles(turns)
    if not any(turn["content"].strip() for turn in turns):
        raise DataError(Fault("", f"the text under '{key}' is empty", "leave the row out"))
    return {"prompt": turns, "label": row[label], **conversation.template_options(row, left_out)}


def like_label(row: Row, *, text: str, messages: str, label: str, **_: object) -> int:
    return row_shape.has(row, text, label) or row_shape.has(row, messages, label)
