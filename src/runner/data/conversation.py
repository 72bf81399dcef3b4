"""Messages of a conversation: read the turns of a row, and refuse what they carry but training would leave out.

A key that changes what is learnt (tools, weights, reasoning, images …) is honoured or refused, never dropped. Keys
without a meaning for training (``id``, ``source``) are allowed.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from runner.errors import DataError, Fault, quoted, suggest

Message = dict[str, Any]
"""``{"role": …, "content": …}``, and ``train`` if the turn itself says whether it is trained."""
Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"developer": "system", "observation": "tool", "tool_response": "tool", "function": "tool"}
"""Roles of other programs, with the same role here."""
TOOL_CALLS = ("function_call", "tool_call")
"""Roles of other programs for a turn that calls a tool: the text is a call, not an answer."""
TRAIN_KEYS = ("weight", "loss_weight", "train", "training", "loss")
"""Keys of a turn that say whether it is trained: 1 or true, 0 or false."""

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tools", "functions", "tool_calls", "function_call")
TURN_WORDS = (*_CALLS, *_REASONING, *_MEDIA, *TRAIN_KEYS, "train_detail", "training_detail", "trainable", "loss_mask",
              "mask", "refusal", "tool_plan")  # fmt: skip
WEIGHTS = ("weight", "loss_weight", "sample_weight", "train", "loss_mask")
KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
VERDICTS = ("label", "kto_tag")
"""Whether the answer of a row is a good one."""
SYSTEM = ("system", "system_prompt", "system_message")
ROW_WORDS = (*_CALLS, *_REASONING, *_MEDIA, *WEIGHTS, *VERDICTS, *SYSTEM, "history", "chat_template_kwargs",
             "enable_thinking")  # fmt: skip


def read(turns: Sequence[Row], role: str, content: str, ignore: Collection[str] = ()) -> list[Message]:
    """The messages of these turns; ``role`` and ``content`` are the keys of a turn.

    Raises:
        DataError: a text that is no text, or a weight that is neither 0 nor 1.
    """
    return [_message(number, turn, role, content, ignore) for number, turn in enumerate(turns, start=1)]


def refuse_unused(
    row: Row,
    turns: Sequence[Row],
    used: Collection[str | None],
    *,
    keys: Collection[str] = (),
    ignore: Collection[str] | None = (),
    words: Collection[str] = ROW_WORDS,
    offers: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """Refuse a row, or a turn of it, with a key that changes what is learnt and that its format does not use.

    ``used`` and ``keys``: the keys of the row and of a turn that the format uses. ``ignore``: those that the user
    leaves out knowingly; None: the format has no such option. ``words``: what to look for in the row. ``offers``:
    parameters of the format that could name the key of such a word.

    Raises:
        DataError: with all such keys of the row.
    """
    left_out = ignore or ()
    words = (*words, *itertools.chain.from_iterable(offers.values()))
    found = [("the row", *pair) for pair in _unused(row, words, used, left_out)]
    for number, turn in enumerate(turns, start=1):
        if len(turn) > len(keys):
            pairs = _unused(turn, TURN_WORDS, {*keys, *TRAIN_KEYS}, left_out)
            found += [(f"message {number}", *pair) for pair in pairs]
    if not found:
        return
    each = (f"{owner} has {quoted(key)}{_near(key, word)}" for owner, key, word in found)
    problem = f"{', '.join(each)}: this is not used, and without it something else is learnt"
    names = ",".join(sorted({*left_out, *(key for _, key, _ in found)}))
    remedy = f"leave the row out, or train without the key knowingly: +data.format.ignore=[{names}]"
    for parameter, meant in offers.items():
        if key := next((key for owner, key, word in found if word in meant and owner == "the row"), None):
            remedy = f"use it with data.format.{parameter}={key}, or {remedy}"
    if not offers and any(word in SYSTEM for _, _, word in found):
        remedy = f"make it the first message, with the role system, or {remedy}"
    if ignore is None:
        remedy = "leave the row out, or give messages without this key"
    raise DataError(Fault("data.format", problem, remedy))


def text_of(value: object, what: str) -> str:
    """``value`` if it is a text that can be trained on; ``what``: its name in the message.

    Raises:
        DataError: it is no text, or holds half of a character.
    """
    if not isinstance(value, str):
        problem = f"{what} is {KINDS.get(type(value), type(value).__name__)}; only text can be trained on"
        raise DataError(Fault("", problem, "leave the row out, or write its text as a string"))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        problem = f"{what} contains half of a character (the lone surrogate {half}, character {error.start + 1})"
        raise DataError(Fault("", problem, "correct the text: a character such as an emoji was cut in two")) from None
    return value


def said(role: str, content: object, what: str) -> Message:
    """A message with this text; ``what``: its name in an error."""
    return {"role": role, "content": text_of(content, what)}


def with_system(row: Row, key: str | None, turns: list[Message]) -> list[Message]:
    """The turns with the system prompt under ``key`` before them, if there is one.

    Raises:
        DataError: it is no text, or the turns have a system prompt, too.
    """
    found = row.get(key) if key is not None else None
    if found is None or found == "":
        return turns
    prompt = said("system", found, f"the text under '{key}'")
    if turns and turns[0]["role"] == "system":
        problem = f"has two system prompts: the key '{key}', and the first message"
        remedy = "leave one out; data.format.system=null leaves out the key"
        raise DataError(Fault("", problem, remedy))
    return [prompt, *turns]


def checked(conversation: list[Message]) -> list[Message]:
    """The same messages, if a model can be trained on them.

    Raises:
        DataError: an unknown role, an empty answer, or no answer.
    """
    for number, message in enumerate(conversation, start=1):
        if message["role"] not in ROLES:
            problem = f"message {number} has the unknown role {quoted(message['role'])}. "
            problem += f"{suggest(message['role'], ROLES)} allowed: {', '.join(ROLES)}"
            raise DataError(Fault("", problem, "correct the role in the data"))
        if message["role"] == "assistant" and not message["content"].strip():
            problem = f"message {number}, of the assistant, is empty: it would teach the model to say nothing"
            raise DataError(Fault("", problem, "leave the row out"))
    if not any(message["role"] == "assistant" for message in conversation):
        raise DataError(Fault("", "has no assistant turn: there is nothing to train on", "leave the row out"))
    return conversation


def _message(number: int, turn: Row, role: str, content: str, ignore: Collection[str]) -> Message:
    name, what = turn[role], f"message {number}"
    if not isinstance(name, str):
        problem = f"the role of {what} is {KINDS.get(type(name), type(name).__name__)}, not a text"
        raise DataError(Fault("", f"{problem}; allowed: {', '.join(ROLES)}", "correct the role in the data"))
    name = OTHER_NAMES.get(name, name)
    if name in TOOL_CALLS:
        problem = f"{what} is a tool call (role {name}): tools are not supported"
        raise DataError(Fault("data.format", problem, "leave the row out"))
    text = "" if name == "assistant" and turn[content] is None else _content(turn[content], f"the content of {what}")
    message = said(name, text, f"the content of {what}")
    train = _train(turn, what, {role, content, *ignore}) if len(turn) > 2 else None
    if train is not None and (name != "assistant" or not train):  # an answer of weight 1 is like any other
        message["train"] = train
    return message


def _train(turn: Row, what: str, but: Collection[str]) -> bool | None:
    """Whether the turn says that it is trained; None if it says nothing."""
    answers = {key: turn[key] for key in TRAIN_KEYS if key not in but and turn.get(key) is not None}
    for key, value in answers.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            problem = f"{what} has {key}={quoted(value)}; allowed: 0 or false (not trained), 1 or true (trained)"
            remedy = f"correct it, or train without the key knowingly: +data.format.ignore=[{key}]"
            raise DataError(Fault("", problem, remedy))
    if len(verdicts := {bool(value) for value in answers.values()}) > 1:
        problem = f"{what} contradicts itself: " + ", ".join(f"{key}={value}" for key, value in answers.items())
        raise DataError(Fault("", problem, "correct the row"))
    return verdicts.pop() if verdicts else None


def _content(value: object, what: str) -> str:
    """The text of a message: a str, or OpenAI's list of text parts."""
    if not isinstance(value, list):
        return text_of(value, what)
    if all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        for number, part in enumerate(value, start=1):
            if unused := next(_unused(part, TURN_WORDS, (), ()), None):
                problem = f"part {number} of {what} has {quoted(unused[0])}, which is not used"
                raise DataError(Fault("", problem, "leave the row out, or write its text as a string"))
        return "".join(text_of(part.get("text"), f"part {n} of {what}") for n, part in enumerate(value, start=1))
    problem = f"{what} has parts that are not text; only text can be trained on"
    raise DataError(Fault("", problem, "leave the row out, or write its text as a string"))


def _unused(
    mapping: Row, words: Collection[str], used: Collection[str | None], ignore: Collection[str]
) -> Iterator[tuple[str, str]]:
    """(key, the word of ``words`` that it means) for each key with a value, except those used or ignored."""
    for key, value in mapping.items():
        word = "" if key in used or key in ignore else _meaning(str(key), tuple(words))
        if word and not _says_nothing(word, value):
            yield str(key), word


@functools.lru_cache(1024)
def _meaning(key: str, words: tuple[str, ...]) -> str:
    """The word of ``words`` that this key means or misspells; an empty string if it means none of them."""
    plain = re.sub(r"[^a-z]", "", key.lower())
    known = {word.replace("_", ""): word for word in words}
    if plain in known:
        return known[plain]
    # Same letters in another order, or one letter more or less; the first letter counts: "height" is no "weight".
    near = (word for word in known if word[:1] == plain[:1] and len(plain) >= 4 and _differs_little(plain, word))
    return known.get(next(near, ""), "")


def _differs_little(one: str, other: str) -> bool:
    if sorted(one) == sorted(other):
        return True
    long, short = (one, other) if len(one) > len(other) else (other, one)
    return len(long) == len(short) + 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def _near(key: str, word: str) -> str:
    return "" if key == word else f" (did you mean '{word}'?)"


def _says_nothing(word: str, value: object) -> bool:
    """Whether the value is the same as no value: null, empty, or the weight 1."""
    text = value.strip().lower() if isinstance(value, str) else value
    if text is None or text in ("", "[]", "{}", "null", "none") or (isinstance(value, list | dict) and not value):
        return True
    if word in VERDICTS:
        return text is not False and text != "false"
    return word in WEIGHTS and text in (1, "1", "1.0", "true")
