"""Does a value fit its annotation, and what is allowed, in the words of someone who writes YAML."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import annotated_types

from runner.errors import is_control, suggest


@dataclass(frozen=True)
class Must:
    """A bound of an ``Annotated`` type that annotated_types has no name for."""

    holds: Callable[[Any], bool]
    words: str = ""
    """What the bound demands, as in "a text …"; empty where only a value that breaks it needs words."""
    problem: str = ""
    """Why a value that breaks the bound does not fit; empty if ``words`` explain it."""


HANDLED = (
    annotated_types.Gt, annotated_types.Ge, annotated_types.Lt, annotated_types.Le, annotated_types.MinLen,
    annotated_types.MaxLen, annotated_types.MultipleOf, annotated_types.Predicate, Must,
)  # fmt: skip
"""The bounds that are enforced; a test refuses annotations with other bounds."""


def mismatch(value: object, annotation: Any) -> str:
    """Why ``value`` does not fit ``annotation``; an empty string where it does."""
    if fits(value, annotation):
        return ""
    if isinstance(value, str) and not value.strip():
        return f"is empty, must be {allowed(annotation)}"
    if isinstance(value, str) and any(map(is_control, value)):
        return f"contains control characters, must be {allowed(annotation)}"
    if reason := _broken(value, annotation):
        return f"{reason}, must be {allowed(annotation)}"
    if isinstance(value, str) and (near := suggest(value, _literals(annotation))):
        return f"{near} allowed: {allowed(annotation)}"
    return f"must be {allowed(annotation)}"


def _broken(value: object, annotation: Any) -> str:
    """The problem of the first bound that the value breaks and that has its own words for that."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, (_broken(value, choice) for choice in arguments)), "")
    if typing.get_origin(annotation) is not typing.Annotated or not fits(value, arguments[0]):
        return ""
    broken = (bound.problem for bound in parts(annotation) if isinstance(bound, Must) and not bound.holds(value))
    return next(broken, "") if value is not None else ""


def fits(value: object, annotation: Any) -> bool:
    """Whether the value has the type, and is within all bounds of it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return True
    if origin is typing.Annotated:
        return fits(value, arguments[0]) and all(_within(value, bound) for bound in parts(annotation))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (list, tuple) or annotation in (list, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(fits(item, inner) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        inner = arguments[1] if arguments else Any
        return isinstance(value, Mapping) and all(fits(item, inner) for item in value.values())
    if annotation is float:
        # Neither .inf nor .nan, nor a whole number that no float can hold.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None or annotation is type(None):
        return value is None
    return not isinstance(annotation, type) or isinstance(value, annotation)


def parts(annotation: Any) -> Iterator[object]:
    """The bounds of an ``Annotated`` type, each by itself: ``Len(1, 3)`` is ``MinLen(1)`` and ``MaxLen(3)``."""
    for bound in annotation.__metadata__:  # a test for a protocol is slow: last
        is_group = not isinstance(bound, HANDLED) and isinstance(bound, annotated_types.GroupedMetadata)
        yield from bound if is_group else (bound,)


def _within(value: Any, bound: object) -> bool:
    if value is None:
        return True
    match bound:
        case annotated_types.Gt(gt=limit):
            return bool(value > limit)
        case annotated_types.Ge(ge=limit):
            return bool(value >= limit)
        case annotated_types.Lt(lt=limit):
            return bool(value < limit)
        case annotated_types.Le(le=limit):
            return bool(value <= limit)
        case annotated_types.MinLen(min_length=limit):
            return len(value) >= limit
        case annotated_types.MaxLen(max_length=limit):
            return len(value) <= limit
        case annotated_types.MultipleOf(multiple_of=unit):
            return bool(value % unit == 0)
        case annotated_types.Predicate(func=holds) | Must(holds=holds):
            return bool(holds(value))
    return True


def allowed(annotation: Any) -> str:
    """The annotation in the words of someone who writes YAML: ``one of nf4, fp4``, ``a whole number >= 1``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        words = " and ".join(filter(None, (_bound_text(bound) for bound in arguments[1:])))
        return f"{allowed(arguments[0])} {words}".strip()
    if origin in (typing.Union, types.UnionType):
        return " or ".join(allowed(choice) for choice in arguments)
    if origin is Literal:
        return "one of " + ", ".join(_yaml(choice) for choice in arguments)
    if origin in (list, tuple) or annotation in (list, tuple):
        return "a list" + (f" (each: {allowed(arguments[0])})" if arguments else "")
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bound_text(bound: object) -> str:
    match bound:
        case annotated_types.Gt(gt=limit):
            return f"> {_number(limit)}"
        case annotated_types.Ge(ge=limit):
            return f">= {_number(limit)}"
        case annotated_types.Lt(lt=limit):
            return f"< {_number(limit)}"
        case annotated_types.Le(le=limit):
            return f"<= {_number(limit)}"
        case annotated_types.MinLen(min_length=least):
            return f"of length >= {least}"
        case annotated_types.MaxLen(max_length=most):
            return f"of length <= {most}"
        case annotated_types.Len(min_length=least, max_length=most):
            if most is None:
                return f"of length >= {least}"
            return f"of length {least}" if least == most else f"of length {least} to {most}"
        case annotated_types.MultipleOf(multiple_of=unit):
            return f"that is a multiple of {unit}"
        case annotated_types.Predicate(func=holds):
            return f"that fulfils {getattr(holds, '__name__', holds)}"
        case Must(words=words):
            return words
    return ""


def _number(limit: Any) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
    return [word for part in typing.get_args(annotation) for word in _literals(part)]


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
