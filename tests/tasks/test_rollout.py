"""Advantages of answers within their group."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from test_grpo import task_of

from runner.data.texts import Texts
from runner.tasks import rollout


def test_a_record_has_the_columns_of_all_rows() -> None:
    rows = [{"prompt": "a", "columns": {"answer": "4"}}, {"prompt": "b", "columns": {"hint": None, "source": "web"}}]
    records = Texts.of([json.dumps(row) for row in rows])
    assert rollout.record_of(records, 0)["columns"] == {"answer": "4", "hint": None, "source": None}
    assert rollout.record_of(records, 1) == {**rows[1], "columns": {"answer": None, "hint": None, "source": "web"}}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: Any) -> None:
    rewards = np.array([[1.0, 0.0, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0]])
    how = task_of(num_generations=4, scale_rewards=scale).prepare.__self__  # type: ignore[union-attr]
    spread = rewards.std(ddof=1)
    divisor = {"group": np.array([rewards[0].std(ddof=1) + 1e-4, 1.0])[:, None], "batch": spread + 1e-4, "none": 1.0}
    expected = (rewards - rewards.mean(1, keepdims=True)) / divisor[scale]
    np.testing.assert_allclose(how.advantages(rewards, spread), expected, rtol=1e-9)


def test_advantages_against_the_others_and_without_unscored_answers() -> None:
    how = task_of(loss_type="rloo", scale_rewards="none").prepare.__self__  # type: ignore[union-attr]
    given = np.array([[1.0, 0.0, np.nan, 0.5], [3.0, np.nan, np.nan, np.nan]])
    expected = [[1 - 0.25, 0 - 0.75, 0.0, 0.5 - 0.5], [0.0] * 4]
    np.testing.assert_allclose(how.advantages(given, 0.0), expected, atol=1e-12)
