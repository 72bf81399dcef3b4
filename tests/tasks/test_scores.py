"""Sequences that get one score: labels at their last token, and what cannot be weighted."""

from __future__ import annotations

import pytest

from runner.data.packing import IGNORED
from runner.errors import DataError
from runner.tasks import scores


def test_the_last_token_alone_counts_as_trained() -> None:
    features = scores.features([5, 6, 7], margin=0.5)
    assert features == {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7], "margin": 0.5}


def test_the_weight_of_a_message_is_refused() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    with pytest.raises(DataError, match="weight of a message, but the whole conversation is scored"):
        scores.tokens(messages, None)
