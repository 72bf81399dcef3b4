"""The score head of a model: its names, its first values, its dtype, and where it gives scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures import two_models

from runner.models import pretrained, sources
from runner.models.kernels import score_head
from runner.models.quantization import none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


def test_a_new_head_depends_on_the_seed_alone(folder: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        torch.rand(seed)
        chosen = score_head.ScoreHead(("reward",), "regression", seed=seed)
        options = {"revision": None, "dtype": "float32", "attention": "auto", "trust_remote_code": False}
        source = sources.pretrained(path=str(folder), **options)
        return pretrained.load(replace(source, head=chosen), none.none(), "cpu").score.weight.detach()

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    assert float(head(1).std()) == pytest.approx(0.02, rel=0.5)
