"""The reward of experiment=grpo."""

from __future__ import annotations

import pytest

from runner.tasks.example_rewards import lowercase_share


def test_the_share_of_lower_case_letters_of_texts_and_messages():
    assert lowercase_share(["abcD", "", [{"role": "assistant", "content": "aB"}]]) == pytest.approx([0.75, 0, 0.5])
