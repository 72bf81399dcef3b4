"""Messages of a conversation: read the turns of a row, and check them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from runner.data import images, tool_calls
from runner.data.examples import Example, chat
from runner.data.training_keys import (
    OPTIONS,
    REASONING,
    TRAIN_KEYS,
    TURN_WORDS,
    WEIGHTS,
    Row,
    has_value,
    unused,
    weight_of,
)
from runner.errors import DataError, Fault, quoted, suggest

Message = dict[str, Any]
"""``{"role": …, "content": …}``; also ``tool_calls``, ``reasoning_content``, ``name`` and ``tool_call_id`` where the
row has them, ``images`` (see ``images``), and ``weight`` if the turn has its own weight in the loss."""

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"developer": "system", "observation": "tool", "tool_response": "tool", "function": "tool"}
"""Roles of other programs, with the same role here."""
TOOL_CALLS = ("function_call", "tool_call")
"""Roles of other programs for a turn that calls a tool: the text is a call, not an answer."""
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read(turns: Sequence[Row], role: str, content: str, ignore: Collection[str] = ()) -> list[Message]:
    """The messages of these turns; ``role`` and ``content`` are the keys of a turn.

    A turn that is a call (``TOOL_CALLS``) becomes part of the assistant's turn before it, if there is one.

    Raises:
        DataError: a text that is no text, a call that is no call, or a weight that is no number from 0.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _message(number, turn, role, content, ignore)
        last: Message = messages[-1] if messages else {"role": ""}
        if turn[role] in TOOL_CALLS and last["role"] == "assistant" and last.get("weight") == message.get("weight"):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def example(row: Row, messages: list[Message], ignore: Collection[str] = ()) -> Example:
    """The messages, with what the row has beside them: tools, weight, options of the chat template, images."""
    kept = {**template_options(row, ignore)}
    images.give(messages, images.of_row(row, ignore))
    weight = weight_of(row, WEIGHTS, "the row", ignore)
    if weight not in (None, 1.0):
        kept["weight"] = weight
    return {"messages": messages, **kept} if kept else messages


def template_options(row: Row, ignore: Collection[str] = ()) -> dict[str, Any]:
    """``tools`` and ``chat_template_kwargs`` of a row, those that have a value."""
    kept: dict[str, Any] = {}
    if "tools" not in ignore and has_value("tools", row.get("tools")):
        kept["tools"] = _whole(tool_calls.tools(row["tools"], "the tools of the row"), "the tools of the row")
    kwargs = row.get("chat_template_kwargs")
    if "chat_template_kwargs" not in ignore and has_value("chat_template_kwargs", kwargs):
        if isinstance(kwargs, str) and kwargs.lstrip().startswith("{"):
            kwargs = tool_calls.parsed(kwargs, "chat_template_kwargs")
        if not isinstance(kwargs, Mapping):
            problem = f"chat_template_kwargs is {quoted(kwargs)}; an object is needed"
            raise DataError(Fault("", problem, 'for example {"enable_thinking": false}'))
        kept["chat_template_kwargs"] = dict(kwargs)
    return kept


def without_weight(example: Example) -> dict[str, Any]:
    """``tools`` and ``chat_template_kwargs`` of a conversation, for rows that cannot have a weight or images.

    Raises:
        DataError: it has one of them.
    """
    talk = chat(example)
    if talk is not None and images.of_messages(talk.messages):
        problem = "the row has an image, which is not used in this format"
        raise DataError(Fault("data.format", problem, images.LEAVE_OUT))
    kept = dict(example) if isinstance(example, dict) else {}
    if "weight" in kept:
        remedy = "leave the weight out: +data.format.ignore=[weight]"
        raise DataError(Fault("data.format", "the row has a weight, which is not used in this format", remedy))
    return {key: kept[key] for key in OPTIONS if key in kept}


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


def message_of(role: str, content: object, what: str) -> Message:
    """A message with this text; ``what``: its name in an error."""
    return {"role": role, "content": text_of(content, what)}


def with_system(row: Row, key: str | None, turns: list[Message]) -> list[Message]:
    """The turns with the system prompt under ``key`` before them, if there is one.

    Raises:
        DataError: it is no text, or the turns have a system prompt, too.
    """
    content = row.get(key) if key is not None else None
    if content is None or content == "":
        return turns
    prompt = message_of("system", content, f"the text under '{key}'")
    if turns and turns[0]["role"] == "system":
        problem = f"has two system prompts: the key '{key}', and the first message"
        remedy = "leave one out; data.format.system=null leaves out the key"
        raise DataError(Fault("", problem, remedy))
    return [prompt, *turns]


def checked(conversation: list[Message]) -> list[Message]:
    """Return the messages; refuse those that a model cannot be trained on.

    Raises:
        DataError: an unknown role, an empty answer, or no answer.
    """
    check_roles(conversation)
    for number, message in enumerate(conversation, start=1):
        if message["role"] == "assistant" and not message["content"].strip() and not message.keys() & CARRIES:
            problem = f"message {number}, of the assistant, is empty: it would teach the model to say nothing"
            raise DataError(Fault("", problem, "leave the row out"))
    if not any(message["role"] == "assistant" for message in conversation):
        raise DataError(Fault("", "has no assistant turn: there is nothing to train on", "leave the row out"))
    return conversation


def one_answer(side: Sequence[Message], name: str, what: str) -> Message:
    """The only message of a part of a row, which must be an answer; ``name`` and ``what``: of the part, in an error."""
    if len(side) == 1 and side[0]["role"] == "assistant":
        return side[0]
    roles = ", ".join(message["role"] for message in side) or "nothing"
    problem = f"the {name} must be one answer of the assistant, it is: {roles}"
    raise DataError(Fault("", problem, f"leave the row out, or move the {what} into the prompt"))


def check_roles(conversation: Sequence[Message]) -> None:
    """Refuse messages with an unknown role."""
    for number, message in enumerate(conversation, start=1):
        if message["role"] not in ROLES:
            problem = f"message {number} has the unknown role {quoted(message['role'])}. "
            problem += f"{suggest(message['role'], ROLES)} allowed: {', '.join(ROLES)}"
            raise DataError(Fault("", problem, "correct the role in the data"))


def refuse_empty(prompt: Sequence[Message]) -> None:
    """Refuse a prompt without any text."""
    if not any(message["content"].strip() or message.keys() & CARRIES for message in prompt):
        raise DataError(Fault("", "the prompt is empty", "leave the row out"))


def is_turn(value: object, role: str, content: str) -> bool:
    """Whether it has a role, and a content or calls or reasoning instead."""
    if not isinstance(value, Mapping) or role not in value:
        return False
    return content in value or any(value.get(key) for key in ("tool_calls", "function_call", *REASONING))


def _message(number: int, turn: Row, role: str, content: str, ignore: Collection[str]) -> Message:
    name, what = turn[role], f"message {number}"
    if not isinstance(name, str):
        problem = f"the role of {what} is {KINDS.get(type(name), type(name).__name__)}, not a text"
        raise DataError(Fault("", f"{problem}; allowed: {', '.join(ROLES)}", "correct the role in the data"))
    if name in TOOL_CALLS:
        message: Message = {"role": "assistant", "content": "", "tool_calls": _calls(turn.get(content), what)}
    else:
        name, value = OTHER_NAMES.get(name, name), turn.get(content)
        value = "" if name == "assistant" and value is None else value
        message = {"role": name, **_body(value, f"the content of {what}", ignore)}
    if len(turn) > 2 or content not in turn:
        message |= _carried(turn, what, {role, content, *ignore})
    if message["role"] != "assistant" and (extra := message.keys() & CARRIES):
        problem = f"{what} has {quoted(min(extra))}, but its role is {message['role']}, not assistant"
        raise DataError(Fault("", problem, "correct the role in the data"))
    if message["role"] == "assistant" and message.get("weight") == 1.0:
        del message["weight"]  # an answer of weight 1 is like any other
    return message


CARRIES = frozenset({"tool_calls", "reasoning_content"})
"""Keys that an answer may have besides its content, or instead of it."""


def _carried(turn: Row, what: str, but: Collection[str]) -> Message:
    """The keys of a turn besides role and content, in the shape of ``Message``."""
    kept: Message = {}
    for key in ("tool_calls", "function_call"):
        if key not in but and has_value(key, turn.get(key)):
            kept["tool_calls"] = _calls(turn[key], what)
    reasons = [turn[key] for key in REASONING if key not in but and has_value(key, turn.get(key))]
    if reasons:
        kept["reasoning_content"] = text_of(reasons[0], f"the reasoning of {what}")
    for key in ("name", "tool_call_id"):
        if key not in but and has_value(key, turn.get(key)):
            kept[key] = text_of(turn[key], f"the {key} of {what}")
    weight = weight_of(turn, TRAIN_KEYS, what, but)
    return kept if weight is None else {**kept, "weight": weight}


def _calls(value: object, what: str) -> list[dict[str, Any]]:
    return _whole(tool_calls.calls(value, what), f"a call of {what}")


def _whole(value: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Return the value; refuse texts that contain half of a character."""
    text_of(json.dumps(value, ensure_ascii=False, default=no_json), what)
    return value


def no_json(value: object) -> NoReturn:
    """Refuse a value inside a row that is neither text, number, list nor object; ``default`` of ``json.dumps``."""
    problem = f"contains a value of the type {type(value).__name__}, which is neither text nor a number"
    raise DataError(Fault("", problem, "write it as text or a number"))


def _body(value: object, what: str, ignore: Collection[str]) -> Message:
    """Content, images, reasoning and calls of a message: a text, or a list of parts (as of OpenAI or LLaMA-Factory)."""
    if not isinstance(value, list):
        return {"content": text_of(value, what)}
    body: Message = {"content": ""}
    for number, part in enumerate(value, start=1):
        kind, here = part.get("type") if isinstance(part, Mapping) else None, f"part {number} of {what}"
        if kind in images.PARTS and images.is_ignored(ignore):
            continue
        if kind in images.PARTS:
            body["content"] += images.MARK
            body["images"] = [*body.get("images", ()), images.of_part(part, here)]
            continue
        if kind not in ("text", "reasoning", "thinking", "tool_call"):
            problem = f"{what} has parts that are neither text nor images; only these can be trained on"
            raise DataError(Fault("", problem, "leave the row out, or write its text as a string"))
        if key_and_word := next(unused(part, TURN_WORDS, (kind,), ()), None):
            problem = f"{here} has {quoted(key_and_word[0])}, which is not used"
            raise DataError(Fault("", problem, "leave the row out, or write its text as a string"))
        inner = next((part[key] for key in (kind, "value", "text") if key in part), None)
        if kind == "tool_call":
            body["tool_calls"] = [*body.get("tool_calls", ()), *_calls(inner, here)]
        else:
            key = "content" if kind == "text" else "reasoning_content"
            body[key] = body.get(key, "") + text_of(inner, here)
    return body
