"""Runs that cannot be compared are refused with what there is."""

from __future__ import annotations

import pytest
from fixtures.results import RUNS, a_run

from runner.errors import ConfigError
from runner.report import leaderboard


def test_a_condition_that_no_run_meets_says_which_values_there_are():
    runs = [a_run("tiny one", loss=n, quant=quant, lora__r=n) for n, quant in enumerate(["4bit", "8bit"] * 6)]
    with pytest.raises(
        ConfigError, match=r"none of the 12 runs matches this condition\n.*quant: 4bit, 8bit; lora.r: 0 to 11"
    ):
        leaderboard.of(runs, where="quant=4bits and r>=0")
    assert len(leaderboard.of(runs, where="name~tiny").results) == 12, "name is what the run is called"


def test_runs_of_different_tasks_are_not_compared():
    runs = [a_run("a", loss=1), a_run("b", loss=2, task="pretrain"), a_run("c", loss=3)]
    with pytest.raises(ConfigError, match=r"different tasks \(2 of sft, 1 of pretrain\)(?s:.*)--where task=sft"):
        leaderboard.of(runs)
    assert [run.run for run in leaderboard.of(runs, where="task=pretrain").results] == ["b"]


def test_where_nothing_is_completed_it_says_what_there_is():
    with pytest.raises(ConfigError, match=r"none of the 2 runs is completed: 1 running, 1 queued"):
        leaderboard.of([a_run("a", "running", loss=1), a_run("b", "queued")])
    with pytest.raises(ConfigError, match="none of the 3 runs matches this condition"):
        leaderboard.of(RUNS, where="lora.r>100")
    with pytest.raises(ConfigError, match=r"no completed run has the metric eval/loss(?s:.*)--sort: acc/x"):
        leaderboard.of([a_run("a", **{"acc/x": 1.0})])
