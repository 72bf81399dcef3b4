"""Parse JSON; refuse repeated keys, and name the line of an error."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from runner.errors import DataError, Fault, quoted

_TOKENS = re.compile(r'(?P<text>"(?:[^"\\]|\\.)*")(?P<colon>\s*:)?|[\[\]{}]')


def parse(file: Path, text: str, remedy: str, line: int | None = None) -> Any:
    """JSON as Python values.

    ``remedy``: for a text that continues after the end of its value, or that is one list over several lines. ``line``:
    the number of the line, if the text is one line of the file.

    Raises:
        DataError: malformed, a key that occurs twice, or a number or nesting that Python does not read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        if line is None and error.msg != "Extra data":
            remedy = ""
        problem, at = f"malformed JSON: {error.msg} (column {error.colno})", error.pos
    except RecursionError:
        problem, at, remedy = "lists or objects are nested too deep", _deepest(text), "write the values less deep"
    except ValueError as error:
        remedy = "correct that line"
        if isinstance(error, _RepeatedKeyError):
            problem, at = f"the key {quoted(error.args[0])} occurs twice in one object", _repeated(text)
        else:
            match = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1},}}", text)
            problem, at = "a number has too many digits", match.start() if match else 0
            remedy = "write it as a text"
    where = line or text.count("\n", 0, at) + 1
    raise DataError(Fault("", f"{file}:{where}: {problem}", remedy or "correct that line")) from None


class _RepeatedKeyError(ValueError):
    """A key occurs twice in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return row


def _deepest(text: str) -> int:
    """The position of the most deeply nested bracket."""
    depth, best, at = 0, 0, 0
    for token in _TOKENS.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > best:
            best, at = depth, token.start()
    return at


def _repeated(text: str) -> int:
    """The position of the first key that occurs twice in its object."""
    objects: list[set[str]] = []
    for token in _TOKENS.finditer(text):
        if token[0] in "[{":
            objects.append(set())
        elif token[0] in "]}":
            objects.pop()
        elif token["colon"]:
            key = json.loads(token["text"])
            if key in objects[-1]:
                return token.start()
            objects[-1].add(key)
    return 0
