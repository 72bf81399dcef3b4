"""Hydra's syntax of sweeps becomes a space to search."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from typing import Any

import pytest
from fixtures.searches import play
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from runner.errors import ConfigError
from runner.sweep import space


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("k=interval(1e-5,1e-2)", FloatDistribution(1e-5, 1e-2)),
        ("k=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("k=int(interval(1,8))", IntDistribution(1, 8)),
        ("k=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("k=range(1,9)", IntDistribution(1, 8)),
        ("k=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("k=range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
        ("k=4,8,16", CategoricalDistribution(("4", "8", "16"))),
        ("k=choice(none,4bit)", CategoricalDistribution(("none", "4bit"))),
    ],
)
def test_hydras_syntax_becomes_optunas_distribution(text: str, distribution: Any):
    (dimension,) = space.dimensions(OverridesParser.create(), [text], {})
    assert dimension.distribution() == distribution
    again = space.dimensions(OverridesParser.create(), [], {"k": text.partition("=")[2]})
    assert [each.distribution() for each in again] == [distribution]


@pytest.mark.parametrize("value", [1.2345678901234567e-05, 0.1, 3.0, 1e-30])
def test_a_proposed_number_is_trained_to_the_last_digit(value: float):
    (dimension,) = space.dimensions(OverridesParser.create(), ["k=interval(0,1)"], {})
    override = OverridesParser.create().parse_override(dimension.override(value))
    assert override.value() == value


@pytest.mark.parametrize(
    ("swept", "more", "told"),
    [
        ([], {}, "the search space is empty"),
        (["k=8"], {}, "is a single value, not a range"),
        (["k=interval(2,1)"], {}, "has its ends in the wrong order\n    → put the smaller first: interval(1,2)"),
        (["k=interval(1,1)"], {}, "is an empty range"),
        (["k=range(2,1)"], {}, "is an empty range"),
        (["k=tag(log,interval(0,1))"], {}, "has no logarithm at its lower end"),
        (["k=tag(log,choice(1,2))"], {}, "cannot use tag(log, …): only intervals can"),
        (["k=tag(lin,interval(0,1))"], {}, "has an unknown tag: lin"),
        (["k=1,2"], {"k": "1,2"}, "is set twice"),
        ([], {"k": "interval(1"}, "is not valid in Hydra's sweep syntax"),
    ],
)
def test_a_space_that_is_none_is_refused(swept: list[str], more: dict[str, str], told: str):
    with pytest.raises(ConfigError) as refused:
        space.dimensions(OverridesParser.create(), swept, more)
    assert told in str(refused.value)


def test_categories_of_a_group_leave_its_keys_to_the_search(play: Any):
    assert play("search=random", "search.trials=3", "quant=none,4bit", "sweep=it") == (0, 2)
    assert play("search=random", "search.trials=3", "quant=none,4bit", "sweep=it") == (0, 0)
