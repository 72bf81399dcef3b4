"""What is printed fits its width."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
from fixtures.run_folders import _in_a_new_folder
from hydra.core.override_parser.overrides_parser import OverridesParser

from runner import terminal


def test_long_names_stay_apart_when_they_are_cut():
    fixed = "model=tiny,train.max_steps=20,data.max_length=128"
    names = [f"{fixed},lora.r={r},lora.lora_alpha={alpha}" for r in (8, 16) for alpha in (16, 32)]
    for width in (30, 48):
        shown = terminal.distinct_names([*names, "short"], width)
        assert len(set(shown)) == 5
        assert max(map(len, shown)) <= width
    assert terminal.distinct_names([*names, "short"], 48)[0] == "…lora.r=8,lora.lora_alpha=16"
    assert terminal.distinct_names([names[0], names[0]], 20) == [f"{names[0][:19]}…"] * 2


@pytest.mark.parametrize(
    "path", ["outputs/2026-11-30/10-15-00", "my runs/a", "a'b/c", "lr(1,2)=[3]", "a$b;c&d", "ünï", "a\\b", " x ", "50%"]
)
def test_a_path_that_is_printed_in_a_command_can_be_copied(path: str):
    assert shlex.split(terminal.typed(path)) == [path]
    (word,) = shlex.split(terminal.typed(path, "resume"))
    assert OverridesParser.create().parse_override(word).value() == path
    assert terminal.typed("outputs/a", "resume") == "resume=outputs/a"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that ``terminal`` reads; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()


def test_an_evaluation_without_a_terminal_shows_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with terminal.Display(5) as display:
        for done in range(9):
            display.evaluating(done, 8)
            clock[0] += 6.0
        display.evaluating(0, 2)  # the next one is fast
        display.evaluating(1, 2)
        display.evaluating(2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating 2/8  eta 36 s", "evaluating 4/8  eta 24 s", "evaluating 6/8  eta 12 s",
    ]  # fmt: skip


def test_the_time_of_a_part_inside_another_counts_once(clock: list[float]):
    parts = terminal.Stopwatch()
    for _ in range(2):
        with parts.timing("training"):
            clock[0] += 5.0
            with parts.timing("evaluation"):
                clock[0] += 2.0
            clock[0] += 1.0
    assert parts.seconds == {"evaluation": 4.0, "training": 12.0}


def test_thousands_of_names_are_not_compared_with_each_other() -> None:
    compared = []

    class Name(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return str(self) == other

        __hash__ = str.__hash__

    names = [Name(f"seed={number}") for number in range(300)]
    assert terminal.distinct_names(names, 48) == list(map(str, names))
    assert len(compared) <= 2 * len(names), "300 * 300 would be 90,000"
