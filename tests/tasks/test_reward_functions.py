"""Reward functions of the user: what they get, what they may return, and their time limit."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from runner.errors import DataError
from runner.tasks import rollout
from runner.tasks.reward_functions import Rewards


def rewards_of(tmp_path: Path, body: str, timeout_s: float = 5.0) -> Rewards:
    file = tmp_path / f"scores_{abs(hash(body))}.py"
    file.write_text(f"import time\n\ndef score(completions, **columns):\n    {body}\n")
    return Rewards([f"{file}:score"], (str(file),), [1.0], timeout_s)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return [1.0]", "returned 1 numbers for 2 answers"),
        ("return [1.0, float('nan')]", "returned nan for answer 2"),
        ("return [1.0, 'good']", "returned 'good' for answer 2"),
        ("return 1.0", "returned float, not a list of numbers"),
        ("return 1 / 0", r"ZeroDivisionError: division by zero \(.*, line 4\)"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_function_that_returns_no_rewards_is_refused(tmp_path: Path, body: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        rewards_of(tmp_path, body).of(["a", "b"], ["c", "d"], [[1], [2]], {})


def test_a_function_that_sleeps_is_ended_also_if_it_catches_everything(tmp_path: Path) -> None:
    body = "\n    ".join(["try:", "    time.sleep(600)", "except Exception:", "    time.sleep(600)"])
    began = time.monotonic()
    with pytest.raises(DataError, match=r"was not done after 0.2 s with 1 answers"):
        rewards_of(tmp_path, body, 0.2).of(["a"], ["b"], [[1]], {})
    assert time.monotonic() - began < 300


def test_rows_may_have_different_columns(tmp_path: Path) -> None:
    rewards = rewards_of(tmp_path, "return [0.0 if each is None else float(each) for each in columns['answer']]")
    records = [{"prompt": "a", "columns": {}}, {"prompt": "b", "columns": {"answer": "4"}}]
    assert rollout.scored(rewards, records, ["x", "y"], [[1], [2]])[:, 0].tolist() == [0.0, 4.0]


def test_functions_see_the_columns_and_none_is_not_scored(tmp_path: Path) -> None:
    rewards = rewards_of(tmp_path, "return [None if key is None else len(key) for key in columns['key']]")
    scores = rewards.of(["a", "b"], ["c", "d"], [[1], [2]], {"key": ["xyz", None]})
    assert scores[0, 0] == 3
    assert math.isnan(scores[1, 0])
    assert math.isnan(rewards.total(scores)[1])
