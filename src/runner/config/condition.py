"""Parser of conditions: on runs (``--where``, ``lora.r>=8 and (quant=4bit or not status=failed)``) and on rows of data.

    either   = both {"or" both}
    both     = single {"and" single}
    single   = "not" single | "(" either ")" | KEY OPERATOR VALUE

Not Python's own parser: user input is never evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from runner.errors import ConfigError, Fault

Value = str | float | None
Lookup = Callable[[str], Value]
"""Key → its value; None if the run or row does not have the key."""
Condition = Callable[[Lookup], bool]

HINT = "write KEY=VALUE, KEY!=VALUE, KEY<VALUE, <=, >, >=, or KEY~TEXT (contains); join them with and, or, not, ( )"
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[()]|<=|>=|!=|==|[=<>~])|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<word>[^\s()<>=!~"']+))"""
)


def parse(text: str, resolve: Callable[[str], str], option: str = "--where") -> Condition:
    """Parse a condition; ``resolve`` turns a typed key into a full key, or raises. ``option``: where the text is from.

    Numbers are compared as numbers (``1e-4`` equals ``0.0001``), other values as text, ignoring case. A run or row
    without the key matches only ``!=``.

    Raises:
        ConfigError: a syntax error, or an unknown key.
    """
    parser = _Parser(text, _tokens(text, option), resolve, option)
    condition = parser.either()
    if parser.tokens:
        raise parser.fault(f"unexpected '{parser.tokens[0].text}'")
    return condition


def faults(text: str, option: str) -> Iterator[Fault]:
    """The syntax errors of a condition on keys of any name."""
    try:
        parse(text, str, option)
    except ConfigError as error:
        yield from error.faults


@dataclass(frozen=True)
class _Token:
    kind: str
    """mark, quoted or word."""
    text: str


def _tokens(text: str, option: str) -> list[_Token]:
    tokens, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            problem = f"syntax error at: {text[position:].strip()}"
            raise ConfigError(Fault(option, problem, HINT, text))
        quoted = match["double"] if match["double"] is not None else match["single"]
        kind = "mark" if match["mark"] else "word" if match["word"] else "quoted"
        tokens.append(_Token(kind, match["mark"] or match["word"] or quoted))
        position = match.end()
    return tokens


@dataclass
class _Parser:
    text: str
    tokens: list[_Token]
    """The tokens that are not parsed yet."""
    resolve: Callable[[str], str]
    option: str

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
        return ConfigError(Fault(self.option, problem, HINT, self.text))

    def _comparison(self) -> Condition:
        if not self.tokens or self.tokens[0].kind == "mark":
            before = f"a key is missing before '{self.tokens[0].text}'" if self.tokens else ""
            raise self.fault(before or "the condition is incomplete")
        typed = self.tokens.pop(0).text
        key = self.resolve(typed)
        if not self.tokens or self.tokens[0].kind != "mark" or self.tokens[0].text in "()":
            raise self.fault(f"a comparison is missing after '{typed}'")
        mark = self.tokens.pop(0).text
        if not self.tokens or self.tokens[0].kind == "mark":
            raise self.fault(f"a value is missing after '{typed}{mark}'")
        value = self.tokens.pop(0).text
        if mark in OPERATORS and _number(value) is None:
            raise self.fault(f"'{typed}{mark}{value}': '{mark}' compares numbers, and '{value}' is not a number")
        return lambda run: _holds(run(key), mark, value)

    def _joined(self, word: str, part: Callable[[], Condition], join: Callable[[Sequence[bool]], bool]) -> Condition:
        parts = [part()]
        while self._take(word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else lambda run: join([one(run) for one in parts])

    def _take(self, text: str, kind: str = "word") -> bool:
        if self.tokens and self.tokens[0].kind == kind and self.tokens[0].text.lower() == text:
            del self.tokens[0]
            return True
        return False


def _holds(value: Value, mark: str, operand: str) -> bool:
    if value is None:
        return mark == "!="
    if mark == "~":
        return operand.lower() in str(value).lower()
    number, other = _number(value), _number(operand)
    if mark in OPERATORS:
        return number is not None and other is not None and OPERATORS[mark](number, other)
    is_equal = number == other if number is not None and other is not None else str(value).lower() == operand.lower()
    return is_equal != (mark == "!=")


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
