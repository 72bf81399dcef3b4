"""Two runs compared, from what is recorded of them."""

from __future__ import annotations

import math

from runner.report import diff
from runner.tracking.mlflow import store


def test_numbers_are_compared_as_they_are():
    nan, step = math.nan, {0: 1.0, 1: 2.0}
    assert diff.numbers({"train/loss": {1: nan}}, {"train/loss": {1: nan}}).first is None
    assert diff.numbers({"train/loss": {1: math.inf}}, {"train/loss": {1: store.INFINITY}}).first is None
    assert diff.numbers({"train/loss": step}, {"train/loss": {0: 1.0}}).steps == 1
    assert diff.numbers({"train/mfu": {1: 0.1}}, {"train/mfu": {1: 0.2}}).steps == 0, "speed is no result"
    found = diff.numbers({"train/loss": step, "eval/loss": {1: 5.0}}, {"train/loss": step, "eval/loss": {1: 4.0}})
    assert (found.first, found.largest, found.last) == ((1, "eval/loss", 5.0, 4.0), 1.0, 1)
