"""A condition on runs as people write it: ``lora.r>=8 and (quant=4bit or not status=failed)``.

    either   = both {"or" both}
    both     = single {"and" single}
    single   = "not" single | "(" either ")" | KEY OPERATOR VALUE

A grammar of its own, as nothing that was typed may be executed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runner.errors import ConfigError, Fault

Value = str | float | None
Lookup = Callable[[str], Value]
"""Key → what a run has there; None where it has nothing."""
Condition = Callable[[Lookup], bool]

HINT = "write KEY=VALUE, KEY!=VALUE, KEY<VALUE, <=, >, >=, or KEY~TEXT (contains); join them with and, or, not, ( )"
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[()]|<=|>=|!=|==|[=<>~])|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<word>[^\s()<>=!~"']+))"""
)


def parse(text: str, resolve: Callable[[str], str]) -> Condition:
    """The condition that ``text`` says; ``resolve`` turns a key as typed into a key as stored, or refuses it.

    Numbers are compared as numbers (``1e-4`` is ``0.0001``), all else as text. A run without the key meets only ``!=``.

    Raises:
        ConfigError: it is no condition, or has a key that nothing knows.
    """
    parser = _Parser(text, _tokens(text), resolve)
    found = parser.either()
    if parser.left:
        raise parser.fault(f"'{parser.left[0].text}' is not expected there")
    return found


@dataclass(frozen=True)
class _Token:
    kind: str
    """mark, quoted or word."""
    text: str


def _tokens(text: str) -> list[_Token]:
    tokens, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            problem = f"cannot be read from here on: {text[position:].strip()}"
            raise ConfigError(Fault("--where", problem, HINT, text))
        quoted = match["double"] if match["double"] is not None else match["single"]
        kind = "mark" if match["mark"] else "word" if match["word"] else "quoted"
        tokens.append(_Token(kind, match["mark"] or match["word"] or quoted))
        position = match.end()
    return tokens


@dataclass
class _Parser:
    text: str
    left: list[_Token]
    resolve: Callable[[str], str]

    def either(self) -> Condition:
        return self._joined("or", self.both, any)

    def both(self) -> Condition:
        return self._joined("and", self.single, all)

    def single(self) -> Condition:
        if self._take("not"):
            inner = self.single()
            return lambda run: not inner(run)
        if self._take("(", "mark"):
            inside = self.either()
            if not self._take(")", "mark"):
                raise self.fault("a ) is missing")
            return inside
        return self._comparison()

    def fault(self, problem: str) -> ConfigError:
        return ConfigError(Fault("--where", problem, HINT, self.text))

    def _comparison(self) -> Condition:
        if not self.left or self.left[0].kind == "mark":
            raise self.fault(f"a key is missing before '{self.left[0].text}'" if self.left else "it ends too early")
        typed = self.left.pop(0).text
        key = self.resolve(typed)
        if not self.left or self.left[0].kind != "mark" or self.left[0].text in "()":
            raise self.fault(f"a comparison is missing after '{typed}'")
        mark = self.left.pop(0).text
        if not self.left or self.left[0].kind == "mark":
            raise self.fault(f"a value is missing after '{typed}{mark}'")
        value = self.left.pop(0).text
        if mark in OPERATORS and _number(value) is None:
            raise self.fault(f"'{typed}{mark}{value}': only numbers are smaller or larger")
        return lambda run: _holds(run(key), mark, value)

    def _joined(self, word: str, part: Callable[[], Condition], join: Callable[[Sequence[bool]], bool]) -> Condition:
        parts = [part()]
        while self._take(word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else lambda run: join([one(run) for one in parts])

    def _take(self, text: str, kind: str = "word") -> bool:
        if self.left and self.left[0].kind == kind and self.left[0].text.lower() == text:
            del self.left[0]
            return True
        return False


def _holds(there: Value, mark: str, wanted: str) -> bool:
    if there is None:
        return mark == "!="
    if mark == "~":
        return wanted.lower() in str(there).lower()
    number, other = _number(there), _number(wanted)
    if mark in OPERATORS:
        return number is not None and other is not None and OPERATORS[mark](number, other)
    is_equal = number == other if number is not None and other is not None else str(there).lower() == wanted.lower()
    return is_equal != (mark == "!=")


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
