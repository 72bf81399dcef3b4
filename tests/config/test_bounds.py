"""Types of values: what fits, what is enforced, and the words for it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from annotated_types import Interval, Len, MultipleOf, Predicate

from runner.config import bind, bounds, schema
from runner.config.schema import Inside, Name, Positive, Script, Seed, SweepName, Text


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 10**400])
def test_numbers_that_are_none_fit_no_float(value: float):
    assert bounds.mismatch(value, float) == "must be a finite number"
    assert bounds.mismatch([1.0, value], list[float]) == "must be a list (each: a finite number)"


def test_a_seed_is_what_all_generators_take():
    assert bounds.mismatch(2**63 - 1, Seed) == ""
    assert f"<= {2**63 - 1}" in bounds.mismatch(2**63, Seed)
    assert bounds.mismatch(-1, Seed)


@pytest.mark.parametrize("kind", [Text, Name, Inside, SweepName, Script])
@pytest.mark.parametrize("value", ["", " ", "\t", "\x1b[31mred", "a\x00b", "\udcff", 5, None, ["a"]])
def test_what_is_empty_or_moves_the_cursor_is_no_text(kind: Any, value: object):
    assert bounds.mismatch(value, kind)
    assert bounds.mismatch([value], list[kind] | kind)


@pytest.mark.parametrize("value", ["..", ".", "a/b", "/", "../../x", " a", "a" * 121, "ä" * 200])
def test_a_name_stays_in_its_folder(value: str):
    assert bounds.mismatch(value, SweepName)


@pytest.mark.parametrize("value", ["lora.r+quant", "a b", "größe", "x..y", "…"])
def test_other_names_may_be_chosen(value: str):
    assert not bounds.mismatch(value, SweepName)


@pytest.mark.parametrize(("value", "leaves"), [("../x", True), ("a/../../x", True), ("/x", True), ("~/x", True),
                                               ("a/b", False), ("quant=4bit,lora.r=8", False)])  # fmt: skip
def test_a_path_below_a_folder_does_not_leave_it(value: str, leaves: bool):
    assert bool(bounds.mismatch(value, Inside)) == leaves


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (Annotated[list[int], Len(2, 2)], [1, 2], [1]),
        (Annotated[list[int], Len(1)], [1], []),
        (Annotated[str, Len(0, 3)], "abc", "abcd"),
        (Annotated[int, Interval(ge=1, lt=5)], 4, 5),
        (Annotated[int, MultipleOf(8)], 16, 12),
        (Annotated[str, Predicate(str.islower)], "a", "A"),
        (Positive, 1e-8, 1e300),
        (Positive, 1, 1e-300),
    ],
)
def test_each_kind_of_bound_is_enforced(annotation: Any, right: object, wrong: object):
    assert not bounds.mismatch(right, annotation)
    assert "must be " in bounds.mismatch(wrong, annotation)


def test_what_is_allowed_names_each_limit_that_was_broken():
    """The remedy of 1e300 would else be "a finite number > 0", which 1e300 is."""
    assert bounds.allowed(Positive) == "a finite number > 0 and within 1e-30 to 1e30"


def annotations_in_use() -> Iterator[tuple[str, Any]]:
    """(where, annotation) of every key of every option, and of the settings that belong to no option."""
    for settings in (schema.RunSettings, schema.TrainSettings, schema.DataSettings):
        hints = typing.get_type_hints(settings, include_extras=True)
        yield from ((f"{settings.__name__}.{field.name}", hints[field.name]) for field in dataclasses.fields(settings))
    for target in bind.options():
        function = bind.bind_target({bind.TARGET: target})
        yield from ((f"{target}.{key}", bind.parameters(function)[key].annotation) for key in bind.keys_of(function))


def within(annotation: Any) -> Iterator[Any]:
    """The annotation and all that it is made of."""
    yield annotation
    for part in typing.get_args(annotation):
        if not isinstance(part, str | int | float | bool | None):
            yield from within(part)


def test_each_bound_in_use_is_enforced():
    used = [bound for _, found in annotations_in_use() for part in within(found)
            if typing.get_origin(part) is Annotated for bound in bounds.parts(part)]  # fmt: skip
    assert len(used) > 50
    assert [bound for bound in used if not isinstance(bound, bounds.HANDLED)] == []


def test_no_key_takes_any_text_or_any_number():
    """An empty shell variable, an escape sequence and 1e300 fit a plain str, int or float."""
    open_ended = [
        where for where, found in annotations_in_use()
        if not where.endswith("._code_") and _is_open(found)
    ]  # fmt: skip
    assert open_ended == []


def _is_open(annotation: Any) -> bool:
    if annotation in (str, int, float):
        return True
    if typing.get_origin(annotation) is Annotated:
        inner, *found = typing.get_args(annotation)
        limits = {name for bound in found for part in bounds.parts(Annotated[int, bound]) for name in vars_of(part)}
        sides = [{"gt", "ge"} & limits, {"lt", "le"} & limits]
        is_bounded = "holds" in limits or (all(sides) and inner is not str)
        return inner in (int, float, str) and not is_bounded
    parts = [part for part in typing.get_args(annotation) if not isinstance(part, str | int | bool)]
    return any(_is_open(part) for part in (parts[1:] if typing.get_origin(annotation) is dict else parts))


def vars_of(bound: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(bound)}


def test_a_list_without_a_longest_length_says_so():
    assert bounds.allowed(Annotated[list[int], Len(1)]).endswith("of length >= 1")


def test_the_annotations_take_the_values_of_conf():
    for path in sorted(Path(bind.config_dir()).rglob("*.yaml")):
        node = yaml.safe_load(path.read_text()) or {}
        if bind.TARGET in node:
            parameters = bind.parameters(bind.bind_target(node))
            for key, value in node.items():
                if key in parameters and value != "???" and parameters[key].kind is inspect.Parameter.KEYWORD_ONLY:
                    assert not bounds.mismatch(value, parameters[key].annotation), (path, key)
