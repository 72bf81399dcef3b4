"""What to try next is said with how sure it is; differences by chance are called so."""

from __future__ import annotations

import math
import random

import pytest
from fixtures.results import a_run

from runner.report import advice
from runner.report.columns import Goal

LOSS = Goal("eval/loss", is_larger_better=False)


def runs(loss, seeds: int = 4, noise: float = 0.005, **values: list):
    """A grid of runs: the loss of each setting, plus the noise of its seed (equal in all settings) and its own."""
    draw, found = random.Random(0), []
    settings = [{}]
    for key, options in values.items():
        settings = [{**each, key: option} for each in settings for option in options]
    of_seed = [draw.gauss(0, 0.5) for _ in range(seeds)]
    for each in settings:
        for seed in range(seeds):
            measured = loss(**each) + of_seed[seed] + draw.gauss(0, noise)
            found.append(a_run(f"{each}{seed}", loss=measured, seed=seed, **each))
    return found


def said(found, *params: str) -> dict[str, advice.Advice]:
    return {each.parameter: each for each in advice.of(found, [*params, "seed"], LOSS)}


def test_a_range_that_still_falls_is_continued_and_chance_is_called_chance():
    found = said(runs(lambda lora__r, **_: 3 - 0.1 * lora__r**0.5, lora__r=[4, 8, 16], quant=["none", "4bit"]),
                 "lora.r", "quant")  # fmt: skip
    assert list(found) == ["lora.r", "quant"], "what to act on comes first; the seed is nothing to choose"
    assert found["lora.r"].kind == "improving"
    assert "loss still falls towards the largest value: 16 is better than 8 by 0.1" in found["lora.r"].text
    assert "8 pairs of runs" in found["lora.r"].text, "the noise of a seed is the same on both sides of a pair"
    assert found["lora.r"].text.endswith("; try lora.r=32")
    assert found["quant"].kind == "chance"
    assert "no difference beyond chance between" in found["quant"].text


def test_the_best_value_inside_of_a_range_is_sure_only_against_both_neighbours():
    found = said(runs(lambda lora__r: abs(lora__r - 8) / 8, lora__r=[4, 8, 16]), "lora.r")["lora.r"]
    assert (found.kind, found.text.partition(" (")[0]) == (
        "inside", "the best value, 8, is inside the range, between 4 and 16",
    )  # fmt: skip
    flat = said(runs(lambda lora__r: 1.0 if lora__r == 4 else 0.0, lora__r=[4, 8, 16, 32]), "lora.r")["lora.r"]
    assert flat.kind == "unsure"
    assert "may be chance" in flat.text


def test_one_run_of_each_value_is_not_called_sure():
    found = said(runs(lambda lora__r: -lora__r, seeds=1, lora__r=[4, 8]), "lora.r")["lora.r"]
    assert found.kind == "unsure"
    assert "one run each: repeat with seed=1,2,3 to be sure" in found.text
    assert found.text.endswith("try lora.r=16")


def test_options_are_compared_with_the_second_best():
    found = said(runs(lambda optim: {"adamw": 1.0, "lion": 2.0, "muon": 3.0}[optim], optim=["adamw", "lion", "muon"]),
                 "optim")["optim"]  # fmt: skip
    assert found.kind == "better"
    assert found.text.startswith("adamw is better than lion by ")


def test_many_numbers_of_a_search_are_compared_in_intervals_without_pairs():
    draw = random.Random(1)
    rates = [10 ** draw.uniform(-5, -2) for _ in range(40)]
    found = [a_run(str(n), loss=draw.gauss(0, 0.01) - math.log(rate), rate=rate) for n, rate in enumerate(rates)]
    (each,) = advice.of(found, ["rate"], LOSS)
    assert each.kind == "improving"
    assert "pairs" not in each.text
    assert "still falls towards the largest value" in each.text
    assert advice.of(found[:1], ["rate"], LOSS) == []


def test_a_larger_value_may_be_better():
    goal = Goal("eval/token_accuracy", is_larger_better=True)
    found = [a_run(f"{r}{n}", **{"eval/token_accuracy": r / 100 + n / 10000, "lora__r": r, "seed": n % 4})
             for r in (8, 4) for n in range(4)]  # fmt: skip
    (each,) = advice.of(found, ["lora.r", "seed"], goal)
    assert "still rises towards the largest value: 8 is better than 4 by 0.04" in each.text


@pytest.mark.parametrize(
    ("numbers", "is_upwards", "expected"),
    [
        ([4, 8, 16], True, "32"),
        ([4, 8, 16], False, "2"),
        ([1, 2], False, ""),
        ([1e-4, 3e-4], True, "0.0009"),
        ([0.0, 0.1], True, "0.2"),
        ([0.0, 0.1], False, ""),
        ([0.5, 0.9], True, ""),
        ([100, 120], True, "140"),
        ([0, 1, 2], True, "4"),
    ],
)
def test_a_range_is_continued_by_its_last_step(numbers: list[float], is_upwards: bool, expected: str):
    assert advice._beyond(numbers, is_upwards=is_upwards) == expected


def test_a_parameter_that_is_part_of_the_loss_is_not_judged_by_it() -> None:
    runs = [a_run(str(beta), loss=beta, task="kto", task__beta=beta) for beta in (0.1, 0.5)]
    assert advice.of(runs, ["task.beta"], Goal("eval/loss", is_larger_better=False)) == []
