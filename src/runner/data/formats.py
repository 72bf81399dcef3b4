"""What a row means: each option turns one row into a conversation or a text.

A row that does not fit is refused with the format it looks like; the caller adds the file and line.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from runner.config import bind, user_function
from runner.config.schema import Text
from runner.data import conversation, images, row_shape, training_keys
from runner.data.conversation import with_system
from runner.data.examples import Example, Format
from runner.data.training_keys import ROW_KEYS, Row, refuse_unused
from runner.errors import DataError, Fault, RunnerError, quoted

USED = (*ROW_KEYS, *images.KEYS)
"""Keys of a row that each format of conversations uses besides these."""
SYSTEM = {"system": training_keys.SYSTEM}
"""The parameter of a format that names the key of the system prompt."""


def messages(row: Row, *, messages: Text, role: Text, content: Text, ignore: list[Text] | None = None) -> Example:
    """A list of messages under one key, as OpenAI's chat API takes them.

    ``ignore``, in each format: keys that change what is learnt and are left out all the same.
    """
    row_shape.refuse_richer(row, "messages")
    turns = row_shape.turns(row, "messages", "messages", messages, (role, content))
    left_out = ignore or []
    refuse_unused(row, turns, {messages, *USED}, keys={role, content}, ignore=left_out)
    return conversation.example(row, conversation.checked(conversation.read(turns, role, content, left_out)), left_out)


def like_messages(row: Row, *, role: str, content: str, **_: object) -> int:
    return row_shape.has_turns(row, role, content)


def sharegpt(
    row: Row,
    *,
    conversations: Text,
    speaker: Text,
    value: Text,
    roles: dict[str, Text],
    system: Text | None,
    ignore: list[Text] | None = None,
) -> Example:
    """A list of ``{"from": "human", "value": …}``; ``roles``: role of each speaker; ``system``: a key beside it."""
    row_shape.refuse_richer(row, "sharegpt")
    turns = row_shape.turns(row, "sharegpt", "conversations", conversations, (speaker, value))
    left_out = ignore or []
    used = {conversations, system, *USED}
    refuse_unused(row, turns, used, keys={speaker, value}, ignore=_with_system(left_out, system), offers=SYSTEM)
    named = [{**turn, speaker: _role(turn[speaker], roles)} for turn in turns]
    talk = with_system(row, system, conversation.read(named, speaker, value, left_out))
    return conversation.example(row, conversation.checked(talk), left_out)


def like_sharegpt(row: Row, *, speaker: str, value: str, **_: object) -> int:
    return row_shape.has_turns(row, speaker, value)


def alpaca(
    row: Row, *, instruction: Text, input: Text, output: Text, system: Text | None, ignore: list[Text] | None = None
) -> Example:
    """An instruction with an optional input below it, and the output: one exchange."""
    question = row_shape.text(row, "alpaca", "instruction", instruction)
    answer = row_shape.text(row, "alpaca", "output", output)
    extra = row_shape.text(row, "alpaca", "input", input) if row.get(input) is not None else ""
    offers = SYSTEM if extra else {**SYSTEM, "input": ("context",)}
    used = {instruction, input, output, system, *USED}
    refuse_unused(row, (), used, ignore=_with_system(ignore or [], system), offers=offers)
    question = f"{question}\n\n{extra}" if extra.strip() else question
    exchange = [
        conversation.message_of("user", question, "the question"),
        conversation.message_of("assistant", answer, "the answer"),
    ]
    return conversation.example(row, conversation.checked(with_system(row, system, exchange)), ignore or [])


def like_alpaca(row: Row, *, instruction: str, output: str, **_: object) -> int:
    return row_shape.has(row, instruction, output)


def prompt_completion(row: Row, *, prompt: Text, completion: Text, ignore: list[Text] | None = None) -> Example:
    """A prompt and its completion, each a text or a list of messages."""
    left_out = ignore or []
    refuse_unused(row, (), {prompt, completion, *USED}, ignore=left_out)
    question = row_shape.text_or_messages(row, "prompt_completion", "prompt", prompt, "user", left_out)
    answer = row_shape.text_or_messages(row, "prompt_completion", "completion", completion, "assistant", left_out)
    return conversation.example(row, conversation.checked([*question, *answer]), left_out)


def like_prompt_completion(row: Row, *, prompt: str, completion: str, **_: object) -> int:
    return row_shape.has(row, prompt, completion)


def text(row: Row, *, key: Text, ignore: list[Text] | None = None) -> Example:
    """Plain text under one key, for continued pretraining."""
    content = row_shape.text(row, "text", "key", key)
    refuse_unused(row, (), {key}, ignore=ignore or [], words=training_keys.TEXT_WORDS)
    if not content.strip():
        raise DataError(Fault("", f"the text under '{key}' is empty", "leave the row out"))
    return content


def like_text(row: Row, *, key: str, **_: object) -> int:
    return int(isinstance(row.get(key), str))


def custom(row: Row, *, function: Text, _code_: list[str] | None = None) -> Example | None:
    """Your own function, as ``path/to/file.py:name`` or ``package.module:name``: a row in, messages or a text out.

    None leaves the row out.

    ``_code_`` is set by this program: where the copy of the file is that the run keeps.
    """
    call = user_function.load("data.format.function", function, tuple(_code_ or ()))
    try:
        result = call(copy.deepcopy(dict(row)))  # the function may change it, and the row is read again
    except (Exception, SystemExit) as error:
        problem = f"failed on this row: {type(error).__name__}: {error}"
        raise DataError(Fault("data.format.function", problem, "correct the function", function)) from error
    return None if result is None else checked(result, "data.format.function", function)


def of(node: Mapping[str, Any]) -> Format:
    """The format that a configuration names: an option of this module, or a function of the user's own."""
    call: Callable[[Row], Any] = bind.bind(node, "data.format")
    if str(node[bind.TARGET]).startswith("runner."):
        return call
    return functools.partial(_own, call, str(node[bind.TARGET]))


def _own(call: Callable[[dict[str, Any]], Any], name: str, row: Row) -> Example | None:
    try:
        result = call(copy.deepcopy(dict(row)))
    except RunnerError:
        raise
    except (Exception, SystemExit) as error:
        problem = f"{name} failed on this row: {type(error).__name__}: {error}"
        raise DataError(Fault("data.format", problem, "correct the function, or leave the row out")) from error
    return None if result is None else checked(result, "data.format", name)


def checked(result: Any, key: str, name: str) -> Example:
    """The text or messages that a function of the user's returned for a row; anything else is refused."""
    if isinstance(result, str):
        return conversation.text_of(result, f"what {name} returns")
    if isinstance(result, dict) and isinstance(result.get("messages"), list):
        refuse_unused(result, (), {"messages", *USED}, ignore=None)
        messages = checked(result["messages"], key, name)
        assert isinstance(messages, list)
        return conversation.example(result, messages)
    if not isinstance(result, list) or not all(row_shape.is_turn(turn, ("role", "content")) for turn in result):
        problem = f"gave {type(result).__name__}, which is neither a text nor a list of messages"
        raise DataError(Fault(key, problem, 'return [{"role": …, "content": …}, …] or a str', name))
    refuse_unused({}, result, (), keys={"role", "content"}, ignore=None)
    return conversation.example({}, conversation.checked(conversation.read(result, "role", "content")))


def check_custom(*, function: str, _code_: list[str] | None = None) -> Iterator[Fault]:
    """A file, module or name that does not exist, or a file that is not Python; nothing is run."""
    yield from user_function.faults("function", function, _code_ or (), "data.format.function=rows.py:to_messages")


def _role(speaker: object, roles: Mapping[str, str]) -> str:
    """The role of a speaker: of the format's ``roles``, or of those that other programs use."""
    if isinstance(speaker, str) and (role := roles.get(speaker) or conversation.OTHER_NAMES.get(speaker)):
        return role
    if speaker in conversation.TOOL_CALLS:
        return str(speaker)
    problem = f"unknown speaker {quoted(speaker)} (known: {', '.join(roles)})"
    remedy = f"give the speaker a role: +data.format.roles.{speaker}=user"
    if not isinstance(speaker, str) or not speaker.isidentifier():
        remedy = "correct the speaker in the data"
    raise DataError(Fault("data.format.roles", problem, remedy))


def _with_system(ignore: list[str], system: str | None) -> list[str]:
    """``ignore``, and with ``system=null`` the keys of a system prompt: leaving them out is the user's choice."""
    return ignore if system is not None else [*ignore, *training_keys.SYSTEM]
