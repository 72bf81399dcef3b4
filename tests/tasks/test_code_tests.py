"""Answers that are code: what passes, what does not, and what cannot harm."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from runner.tasks import code_tests

HUMAN_EVAL = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"


def passed(answer: str, test: object = "assert f(2) == 4") -> float | None:
    (score,) = code_tests.passed([answer], tests=[test])
    return score


def test_answers_are_tested_as_their_rows_say() -> None:
    square, double = "def f(x):\n    return x * x", "def f(x):\n    return x + x"
    fenced = f"Here it is:\n```python\n{square}\n```\nIt squares."
    answers = [square, double, fenced, "no code", square]
    columns = {"test": [HUMAN_EVAL] * 4 + [None], "entry_point": ["f"] * 5, "level": [1] * 5}
    assert code_tests.passed(answers, **columns) == [1.0, 0.0, 1.0, 0.0, None]
    assert passed(double, ["assert f(2) == 4", "assert f(3) == 6"]) == 1.0
    messages = [{"role": "assistant", "content": square}]
    assert code_tests.passed([messages], tests=["assert f(3) == 9"]) == [1.0]
    with pytest.raises(ValueError, match="no row has tests: a column test, tests, test_list"):
        code_tests.passed([square], reference=["x"])


@pytest.mark.parametrize(
    "answer",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "x = bytearray(2**31)",
        "open('big', 'wb').write(bytes(2**25))",
        "import os; assert 'SECRET' in os.environ",
    ],
)
def test_what_does_not_pass(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hf_x")
    assert passed(answer, "pass") == 0.0


def test_an_answer_that_does_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_tests, "WALL_SECONDS", 0.5)
    alive = tmp_path / "alive"
    child = f"import os, time\nif not os.fork():\n    while True: open({str(alive)!r}, 'w').close(); time.sleep(0.01)\n"
    assert passed(f"{child}while True: pass", "pass") == 0.0
    alive.unlink(missing_ok=True)
    time.sleep(0.1)
    assert not alive.exists()


def test_the_folder_is_empty_and_is_removed(tmp_path: Path) -> None:
    assert (
        passed("import os\nassert os.listdir() == []\nopen('left', 'w').close()", "assert os.listdir() == ['left']")
        == 1
    )
    assert passed(f"import os\nassert os.getcwd() != {os.getcwd()!r}", "pass") == 1


@pytest.mark.parametrize(("count", "right", "k"), [(5, 2, 1), (5, 2, 3), (5, 3, 3), (4, 0, 2), (4, 4, 4), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer(count: int, right: int, k: int) -> None:
    scores = np.array([[1.0] * right + [0.0] * (count - right)])
    choices = list(itertools.combinations(scores[0], k))
    assert code_tests.pass_at_k(scores, k)[0] == pytest.approx(sum(any(each) for each in choices) / len(choices))
    assert np.isnan(code_tests.pass_at_k(np.array([[np.nan] * count]), k)[0])
