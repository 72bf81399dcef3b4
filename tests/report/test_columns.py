"""Names of metrics and parameters, and how their values are written."""

from __future__ import annotations

import math

import pytest
from fixtures.results import a_run

from runner.errors import ConfigError
from runner.report import columns
from runner.report.columns import Goal

RUNS = [a_run("a", loss=1.5, lora__r=8, optim__r=1, lora__alpha=16, **{"train/tokens_per_second": 1234.5})]


@pytest.mark.parametrize(
    ("word", "key"),
    [("loss", "eval/loss"), ("tokens/s", "train/tokens_per_second"), ("alpha", "lora.alpha"), ("lora/r", "lora.r"),
     ("name", "label"), ("status", "status")],
)  # fmt: skip
def test_a_word_means_one_key(word: str, key: str):
    assert columns.resolve(word, RUNS, "--sort") == key


@pytest.mark.parametrize(
    ("word", "problem"), [("r", "'r' is ambiguous.*lora.r, optim.r"), ("lor.r", "no run has the key.*did you mean")]
)
def test_a_word_that_means_several_keys_or_none_is_refused(word: str, problem: str):
    with pytest.raises(ConfigError, match=rf"(?s)--sort: {problem}"):
        columns.resolve(word, RUNS, "--sort")


def test_a_parameter_is_no_metric():
    assert columns.metric("loss", RUNS, "--metrics") == "eval/loss"
    with pytest.raises(ConfigError, match="no run has the metric 'alpha'"):
        columns.metric("alpha", RUNS, "--metrics")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("eval/loss", 1.23456, "1.2346"), ("memory/peak_rss_gib", 1.2, "1.20 GiB"), ("train/tokens_per_second", 1234.5,
     "1234"), ("lora.r", "16", "16"), ("optim.learning_rate", "0.00123456", "0.001235"), ("data.path", "0.0123456.csv",
     "0.0123456.csv"), ("eval/loss", None, "–"), ("train/seconds", 9.87, "9.9 s")],
)  # fmt: skip
def test_a_value_has_the_digits_and_the_unit_of_its_key(key: str, value: columns.Value, text: str):
    assert columns.text(key, value) == text


def test_what_is_no_finite_number_costs_most():
    assert Goal("eval/loss", False).cost(RUNS[0]) == 1.5
    assert Goal("eval/loss", True).cost(RUNS[0]) == -1.5
    assert Goal("status", False).cost(RUNS[0]) == math.inf
    assert columns.number("nan") is columns.number("many") is columns.number(None) is None


def test_a_search_that_all_runs_belong_to_says_what_is_better():
    searched = {"search.objective": "['eval/loss', 'train/tokens']", "search.direction": "maximize"}
    runs = [a_run(name, loss=1.0, **searched) for name in "ab"]
    assert columns.objective(runs) == Goal("eval/loss", True)
    assert columns.objective([*runs, a_run("c", loss=1.0)]) is None
