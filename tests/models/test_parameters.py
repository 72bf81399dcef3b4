"""Parameters by kind, with and without weights."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

from fixtures.model_folders import option, source

from runner.models import architecture, parameters, pretrained
from runner.models.quantization import none
from runner.models.sources import ModelSource


def test_an_empty_model_counts_like_the_real_one(source: ModelSource) -> None:
    empty, real = pretrained.empty(source, none.none()), pretrained.load(source, none.none(), "cpu")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert parameters.describe(empty) == parameters.describe(real)
    counts = parameters.describe(real)
    assert counts["total"] == sum(p.numel() for p in real.parameters())
    assert counts["total"] == counts["embedding"] + counts["linear"] + counts["other"]
    assert (counts["quantized"], counts["stored"], counts["dtype"]) == (0, "float32", "float32")


def test_an_untied_head_is_counted_apart(cache: Path) -> None:
    made = architecture.resolve(option("tiny", tie_word_embeddings=False)())
    counts = parameters.describe(pretrained.empty(made, none.none()))
    assert counts["head"] == counts["embedding"] == 259 * 64
