"""Pairs of answers that cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import two_models
from test_dpo import example, message

from runner.errors import DataError
from runner.tasks import dpo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    return two_models.load(folder)


def test_a_pair_that_cannot_be_compared_is_refused(models: Any) -> None:
    tokenizer = models[2]
    with pytest.raises(DataError, match="same tokens"):
        dpo.encode(example("a", "b", "b"), tokenizer, 256)
    with pytest.raises(DataError, match="gives conversations, but this task needs pairs"):
        dpo.encode([message("user", "a"), message("assistant", "b")], tokenizer, 256)
    assert dpo.encode(example("a long question, longer than the limit", "b", "c"), tokenizer, 8) == []
    late = example("a", "b" * 90 + "c", "b" * 90 + "d")
    assert len(dpo.encode(late, tokenizer, 256)) == 2
    assert dpo.encode(late, tokenizer, 64) == []  # cut to 64 tokens, both answers are the same
    with pytest.raises(DataError, match="has a margin, which this task does not use"):
        dpo.encode({**example("a", "b", "c"), "margin": 1.0}, tokenizer, 256)
