"""The tokens that end an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runner.train import text_generation


@pytest.mark.parametrize(
    ("own", "stop", "expected"),
    [(2, 7, [2, 7]), ([2, 7], 7, [2, 7]), (None, 7, [7]), ([2], None, [2]), (None, None, [])],
)
def test_the_tokens_of_the_model_and_the_end_of_a_turn_end_an_answer(own: Any, stop: Any, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert text_generation.end_tokens(model, stop) == expected
