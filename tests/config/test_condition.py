"""Conditions by example."""

from __future__ import annotations

import pytest
from fixtures.results import RUNS, a_run

from runner.config import condition
from runner.errors import ConfigError
from runner.report import columns, leaderboard


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.r>=8", "bc"), ("lora.r > 4 and quant=4bit", "b"), ("quant=4bit or lora.r=4", "ab"),
        ("not status=failed", "ab"), ("status!=completed", "c"), ("(lora.r=4 or lora.r=16) and quant=none", "ac"),
        ("lora.r=4 or lora.r=16 and quant=4bit", "ab"), ("learning_rate=0.0001", "ac"), ("loss<2", "a"),
        ("loss!=1.5", "bc"), ("data.path~rows", "a"), ("data.path='/x/my rows.jsonl'", "a"), ("r==4.0", "a"),
        ("not (quant=none and lora.r=4)", "bc"), ("NOT lora.r<=4 AND status=failed", "c"), ("label=a", "a"),
    ],
)  # fmt: skip
def test_a_condition_chooses_runs(text: str, expected: str):
    meets = condition.parse(text, lambda key: columns.resolve(key, RUNS, "--where"))
    assert "".join(run.run for run in RUNS if meets(lambda key, run=run: columns.value(run, key))) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora.r>=", "a value is missing after 'lora.r>='"), ("lora.r", "a comparison is missing after 'lora.r'"),
        ("(lora.r=4", r"a \) is missing"), ("lora.r=4 quant=none", "unexpected 'quant'"),
        ("lora.r=4 and", "the condition is incomplete"), ("=4", "a key is missing before '='"),
        ("lora.rr=4", "did you mean"),
        ("quant<4bit", "'<' compares numbers, and '4bit' is not a number"), ("lora.r='4", "syntax error at: '4"),
        ("__import__('os').system('true')", "no run has the key '__import__'"),
    ],
)  # fmt: skip
def test_a_condition_that_says_nothing_is_refused(text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        condition.parse(text, lambda key: columns.resolve(key, RUNS, "--where"))


def test_a_key_that_may_mean_several_things_is_asked_back():
    runs = [a_run("a", loss=1, lora__r=4, model__r=2)]
    with pytest.raises(ConfigError, match=r"'r' is ambiguous(?s:.*)use one of lora\.r, model\.r"):
        leaderboard.of(runs, where="r=4")
