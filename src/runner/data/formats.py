"""What a row means: each option turns one row into a conversation or a text.

A row that does not fit is refused with the format it looks like; the caller adds the file and line.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import bind, code_files, user_code
from runner.config.schema import Text
from runner.data import conversation, row_shape
from runner.data.conversation import Row, refuse_unused, with_system
from runner.data.examples import Example
from runner.errors import ConfigError, DataError, Fault, RunnerError, quoted, suggest

SYSTEM = {"system": conversation.SYSTEM}
"""The parameter of a format that names the key of the system prompt."""


def messages(row: Row, *, messages: Text, role: Text, content: Text, ignore: list[Text] | None = None) -> Example:
    """A list of messages under one key, as OpenAI's chat API takes them.

    ``ignore``, in each format: keys that change what is learnt and are left out all the same.
    """
    turns = row_shape.turns(row, "messages", "messages", messages, (role, content))
    left_out = ignore or []
    refuse_unused(row, turns, {messages}, keys={role, content}, ignore=left_out)
    return conversation.checked(conversation.read(turns, role, content, left_out))


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
    """A list of ``{"from": "human", "value": …}``; ``roles`` says who speaks, ``system`` names a key beside it."""
    turns = row_shape.turns(row, "sharegpt", "conversations", conversations, (speaker, value))
    left_out = ignore or []
    used = {conversations, system}
    refuse_unused(row, turns, used, keys={speaker, value}, ignore=_with_system(left_out, system), offers=SYSTEM)
    named = [{**turn, speaker: _role(turn[speaker], roles)} for turn in turns]
    return conversation.checked(with_system(row, system, conversation.read(named, speaker, value, left_out)))


def like_sharegpt(row: Row, *, speaker: str, value: str, **_: object) -> int:
    return row_shape.has_turns(row, speaker, value)


def alpaca(
    row: Row, *, instruction: Text, input: Text, output: Text, system: Text | None, ignore: list[Text] | None = None
) -> Example:
    """An instruction with an optional input below it, and the output wanted: one exchange."""
    question = row_shape.text(row, "alpaca", "instruction", instruction)
    answer = row_shape.text(row, "alpaca", "output", output)
    extra = row_shape.text(row, "alpaca", "input", input) if row.get(input) is not None else ""
    offers = SYSTEM if extra else {**SYSTEM, "input": ("context",)}
    refuse_unused(
        row, (), {instruction, input, output, system}, ignore=_with_system(ignore or [], system), offers=offers
    )
    question = f"{question}\n\n{extra}" if extra.strip() else question
    exchange = [
        conversation.said("user", question, "the question"),
        conversation.said("assistant", answer, "the answer"),
    ]
    return conversation.checked(with_system(row, system, exchange))


def like_alpaca(row: Row, *, instruction: str, output: str, **_: object) -> int:
    return row_shape.has(row, instruction, output)


def prompt_completion(row: Row, *, prompt: Text, completion: Text, ignore: list[Text] | None = None) -> Example:
    """A prompt and its completion, each a text or a list of messages."""
    left_out = ignore or []
    refuse_unused(row, (), {prompt, completion}, ignore=left_out)
    question = row_shape.text_or_messages(row, "prompt_completion", "prompt", prompt, "user", left_out)
    answer = row_shape.text_or_messages(row, "prompt_completion", "completion", completion, "assistant", left_out)
    return conversation.checked([*question, *answer])


def like_prompt_completion(row: Row, *, prompt: str, completion: str, **_: object) -> int:
    return row_shape.has(row, prompt, completion)


def text(row: Row, *, key: Text, ignore: list[Text] | None = None) -> Example:
    """Plain text under one key, for continued pretraining."""
    found = row_shape.text(row, "text", "key", key)
    refuse_unused(row, (), {key}, ignore=ignore or [], words=conversation.WEIGHTS)
    if not found.strip():
        raise DataError(Fault("", f"the text under '{key}' is empty", "leave the row out"))
    return found


def like_text(row: Row, *, key: str, **_: object) -> int:
    return int(isinstance(row.get(key), str))


def custom(row: Row, *, function: Text, _code_: list[str] | None = None) -> Example:
    """Your own function, as ``path/to/file.py:name`` or ``package.module:name``: a row in, messages or a text out.

    ``_code_`` is set by this program: where the copy of the file is that the run keeps.
    """
    call = _load(function, tuple(_code_ or ()))
    try:
        result = call(dict(row))
    except (Exception, SystemExit) as error:
        problem = f"failed on this row: {type(error).__name__}: {error}"
        raise DataError(Fault("data.format.function", problem, "correct the function", function)) from error
    return checked(result, "data.format.function", function)


def of(node: Mapping[str, Any]) -> Callable[[Row], Example]:
    """The format that a configuration names: an option of this module, or a function of the user's own.

    Raises:
        ConfigError: with all faults of the node.
    """
    call: Callable[[Row], Any] = bind.bind(node, "data.format")
    if str(node[bind.TARGET]).startswith("runner."):
        return call
    return functools.partial(_own, call, str(node[bind.TARGET]))


def _own(call: Callable[[dict[str, Any]], Any], name: str, row: Row) -> Example:
    try:
        result = call(dict(row))
    except RunnerError:
        raise
    except (Exception, SystemExit) as error:
        problem = f"{name} failed on this row: {type(error).__name__}: {error}"
        raise DataError(Fault("data.format", problem, "correct the function, or leave the row out")) from error
    return checked(result, "data.format", name)


def checked(result: Any, key: str, name: str) -> Example:
    """What a function of the user's made of a row, if it is a text or messages.

    Raises:
        DataError: it is something else.
    """
    if isinstance(result, str):
        return conversation.text_of(result, f"what {name} returns")
    if not isinstance(result, list) or not all(row_shape.is_turn(turn, ("role", "content")) for turn in result):
        problem = f"gave {type(result).__name__}, which is neither a text nor a list of messages"
        raise DataError(Fault(key, problem, 'return [{"role": …, "content": …}, …] or a str', name))
    refuse_unused({}, result, (), keys={"role", "content"}, ignore=None)
    return conversation.checked(conversation.read(result, "role", "content"))


def check_custom(*, function: str, _code_: list[str] | None = None) -> Iterator[Fault]:
    """A file, module or name that does not exist, or a file that is not Python; nothing is run."""
    name = function.rpartition(":")[2]
    try:
        tree = ast.parse(_source(function, _code_ or ()).read_text(encoding="utf-8"))
    except ConfigError as error:
        yield from error.faults
        return
    except SyntaxError as error:
        yield Fault("function", f"is not Python: {error.msg} (line {error.lineno})", "correct the file", function)
        return
    bound = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    bound |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    bound |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    if name not in bound:
        problem = f"defines no function '{name}'. {suggest(name, bound)}".strip()
        yield Fault("function", problem, "correct the name", function)


def source_text(function: str, code: Sequence[str]) -> str:
    """The text of a custom function's file, and digests of the modules that it imports from the same folder.

    Raises:
        ConfigError: no such file or module exists.
    """
    file = _source(function, code)
    is_own = code or function.rpartition(":")[0].endswith(".py")
    beside = [path for _, path in code_files.files([file]) if path != file] if is_own else []
    parts = [f"{path.relative_to(file.parent)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in beside]
    return "\0".join([file.read_text(encoding="utf-8"), *parts])


def _source(function: str, code: Sequence[str]) -> Path:
    """The file that holds a custom function: in the user's code, or of an installed package.

    Raises:
        ConfigError: no such file or module exists.
    """
    where, _, name = function.rpartition(":")
    if not where or not name.isidentifier():
        remedy = "for example data.format.function=rows.py:to_messages"
        raise ConfigError(Fault("function", "must be path/to/file.py:name or package.module:name", remedy, function))
    module, paths = _module(function, code)
    for path in paths:
        first, *rest = module.split(".")
        if code_files.module_name(path) == first:
            inside = path.joinpath(*rest)
            candidates = [inside / "__init__.py", inside.with_suffix(".py")] if path.is_dir() else [path]
            if found := next((each for each in candidates if each.is_file()), None):
                return found.absolute()
    try:
        spec = importlib.util.find_spec(where) if not where.endswith(".py") else None
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        remedy = "correct it; a file is sought from the current directory, a module on Python's path"
        raise ConfigError(Fault("function", "no such file or module", remedy, function))
    return Path(spec.origin)


def _module(function: str, code: Sequence[str]) -> tuple[str, list[Path]]:
    """The module of a custom function, and the user's code: the run's copy, or the file that a run of 0.1.0 names."""
    where = function.rpartition(":")[0]
    paths = [Path(path) for path in code]
    if where.endswith(".py"):
        return Path(where).stem, paths or [Path(where).expanduser()]
    return where, paths


@functools.lru_cache
def _load(function: str, code: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
    name = function.rpartition(":")[2]
    module, paths = _module(function, code)
    is_own = module.partition(".")[0] in map(code_files.module_name, paths)
    try:
        found = getattr(user_code.load(module, paths) if is_own else importlib.import_module(module), name, None)
    except ConfigError as error:
        raise ConfigError(
            *(replace(fault, key="data.format.function", value=function) for fault in error.faults)
        ) from None
    except (Exception, SystemExit) as error:
        problem = f"cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(Fault("data.format.function", problem, "correct the file", function)) from error
    if not callable(found):
        problem = f"defines no function '{name}'"
        raise ConfigError(Fault("data.format.function", problem, "correct the name", function))
    call: Callable[[dict[str, Any]], Any] = found
    return call


def _role(speaker: object, roles: Mapping[str, str]) -> str:
    """The role of a speaker: of the format's ``roles``, or of those that other programs use."""
    if isinstance(speaker, str) and (role := roles.get(speaker) or conversation.OTHER_NAMES.get(speaker)):
        return role
    problem = f"unknown speaker {quoted(speaker)} (known: {', '.join(roles)})"
    remedy = f"say who it is: +data.format.roles.{speaker}=user"
    if speaker in conversation.TOOL_CALLS:
        problem = f"the speaker {quoted(speaker)} calls a tool: tools are not supported"
        remedy = f"leave the row out, or train its text as an answer: +data.format.roles.{speaker}=assistant"
    elif not isinstance(speaker, str) or not speaker.isidentifier():
        remedy = "correct the speaker in the data"
    raise DataError(Fault("data.format.roles", problem, remedy))


def _with_system(ignore: list[str], system: str | None) -> list[str]:
    """``ignore``, and with ``system=null`` the keys of a system prompt: leaving them out is the user's choice."""
    return ignore if system is not None else [*ignore, *conversation.SYSTEM]
