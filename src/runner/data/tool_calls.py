"""Tools and calls of them, in the one shape that chat templates expect (transformers' and OpenAI's).

A tool is ``{"type": "function", "function": {"name", "description", "parameters"}}``; a call is
``{"type": "function", "function": {"name", "arguments"}}`` with the arguments as a dict, and an ``id`` if it has one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runner.errors import DataError, Fault, quoted


def tools(value: object, what: str) -> list[dict[str, Any]]:
    """The tools of a row: a list, one tool, or either as JSON; ``what``: its name in an error."""
    each = [_function(tool, f"tool {number} of {what}") for number, tool in enumerate(_listed(value, what), start=1)]
    return [{"type": "function", "function": function} for function, _ in each]


def calls(value: object, what: str) -> list[dict[str, Any]]:
    """The calls of a turn: a list, one call, or either as JSON; arguments given as JSON are parsed.

    Raises:
        DataError: it is something else, or a call's arguments are no JSON object.
    """
    return [_call(call, f"call {number} of {what}") for number, call in enumerate(_listed(value, what), start=1)]


def _call(value: object, what: str) -> dict[str, Any]:
    function, outer = _function(value, what)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parsed(arguments, f"the arguments of {what}")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        problem = f"the arguments of {what} are {quoted(arguments)}; a JSON object is needed"
        raise DataError(Fault("", problem, "correct the call in the data"))
    identity = {"id": outer["id"]} if outer.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _function(value: object, what: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(the inner function, the whole value) of a tool or a call; its name is a text."""
    outer = value if isinstance(value, Mapping) else {}
    inner = outer.get("function", outer)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        problem = f"{what} has no name: {quoted(value)}"
        raise DataError(Fault("", problem, 'write {"name": …, …} or {"type": "function", "function": {"name": …, …}}'))
    return {key: each for key, each in inner.items() if each is not None}, outer


def _listed(value: object, what: str) -> list[Any]:
    value = parsed(value, what) if isinstance(value, str) else value
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        return [value]
    raise DataError(Fault("", f"{what}: {quoted(value)} is neither a list nor an object", "correct the row"))


def parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"{what} cannot be parsed as JSON: {error}"
        raise DataError(Fault("", problem, "correct the JSON, or leave the row out")) from None
