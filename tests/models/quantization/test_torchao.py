"""torchao: trained, counted, saved and loaded again; its weights are the ones that torchao dequantizes."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import TINY, node, option
from fixtures import versions
from fixtures.adapters import load, logits, reloaded, train
from fixtures.model_folders import source

from runner.cli import main
from runner.config.bind import find_faults
from runner.errors import ConfigError
from runner.models import parameters, pretrained
from runner.models.kernels import lora_linear
from runner.models.sources import ModelSource

KINDS = ["int8", "float8"]


@versions.transformers_5
def test_without_torchao_the_remedy_is_named(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as refused:
        pretrained.empty(source, option("quant", "torchao")())
    assert (
        str(refused.value) == "quant: quant=torchao needs torchao, which is not installed\n    → uv pip install torchao"
    )


def test_four_bits_are_no_kind() -> None:
    (fault,) = find_faults(node("quant", "torchao", kind="int4"), "quant")
    assert "one of int8, float8" in str(fault)


def quantized(source: ModelSource, kind: str) -> object:
    pytest.importorskip("torchao")
    return pretrained.load(source, option("quant", "torchao", kind=kind)(), "cpu")


@pytest.mark.extras
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_fused_as_peft_does_and_is_loaded_again(source: ModelSource, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = option("lora", "lora")(quantized(source, kind))
    counts = parameters.describe(model)
    assert counts["stored"] == f"{kind} (torchao)"
    empty = option("lora", "lora")(pretrained.empty(source, option("quant", "torchao", kind=kind)()))
    assert parameters.describe(empty) == counts
    expected = logits(model)
    assert lora_linear.fuse(model) == 14
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    losses = train(model)
    assert losses[-1] < losses[0]
    pretrained.save(model, _tokenizer(source), tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantized(source, kind), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)
    difference = (expected - logits(load(source))).abs().max()
    assert 0 < difference < 0.1, "near the logits of the whole weights"


def _tokenizer(source: ModelSource) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.path)


@pytest.mark.extras
def test_a_run_and_its_merged_export(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "quant=torchao", "train.max_steps=2"]
    assert main.run(["plan", *words]) == 0
    assert main.run([*words, "hydra.run.dir=run"]) == 0
    assert main.run(["export", "run", "merged", "--merged"]) == 0
