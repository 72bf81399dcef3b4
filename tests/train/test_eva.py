"""EVA: the first lora_A are PEFT's own, the model begins as its base, and a run computes them once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed
from fixtures import versions
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import EvaConfig
from torch import Tensor

from runner.data.batches import Batches
from runner.errors import ConfigError
from runner.models import pretrained
from runner.train import build, eva, inputs
from runner.train.distributed.ranks import ALONE
from runner.train.inputs import Inputs
from runner.train.options import Options

EVA = ("lora.init_lora_weights=eva", "lora.r=4", "data.packing=false", "data.train_rows=24", "train.max_steps=8")


def made(*words: str) -> tuple[Inputs, Any, Batches]:
    """The inputs of a run, its model before EVA, and its batches as the model computes them."""
    given = inputs.inputs(Options(composed(*TINY, *EVA, *words)))
    model = build.load_model(given)
    (batches,) = build.resolve_attention(given.source, model, None, given.batches)
    return given, model, batches


def begin(model: Any, batches: Batches, file: Path) -> dict[str, Tensor]:
    """The matrices A after EVA, by name."""
    eva.begin(model, batches, None, ALONE, file, lambda *_: None)
    return {name: each.detach() for name, each in model.named_parameters() if ".lora_A." in name}


class _WithLabels(dict[str, Tensor]):
    """PEFT 0.14 looks for labels as an attribute, and without it decomposes the inputs at all tokens."""

    labels = True


def of_peft(given: Inputs) -> dict[str, Tensor]:
    """The same by PEFT alone."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(pretrained.load(given.source, given.options.quant, "cpu"), config)
    rows = [batch for step in range(eva.BATCHES) for batch in given.batches.step(step)]
    loader = [_WithLabels({name: batch[name] for name in ("input_ids", "labels")}) for batch in rows]
    initialize_lora_eva_weights(model, loader, forward_fn=forward, show_progress_bar=False)
    return {name: each.detach() for name, each in model.named_parameters() if ".lora_A." in name}


def forward(model: Any, batch: dict[str, Tensor]) -> None:
    model(input_ids=batch["input_ids"])


def test_the_first_a_are_those_of_peft(cache: Path, tmp_path: Path) -> None:
    """With attention that rounds as there: another rounding may end the decomposition of a layer a pass later."""
    given, model, batches = made("model.attention=sdpa")
    found, expected = begin(model, batches, tmp_path / "eva.safetensors"), of_peft(given)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_model_begins_as_its_base_and_trains_what_it_did(cache: Path, tmp_path: Path) -> None:
    _, model, batches = made("lora=lora_fa")
    versions.needs_by_document(model)
    assert batches.by_document, "the rows are laid end to end, without padding"
    ids = torch.arange(3, 40)[None]
    before, trained = model.eval()(ids).logits, [p.requires_grad for p in model.parameters()]
    matrices = begin(model, batches, tmp_path / "eva.safetensors")
    assert torch.equal(model.eval()(ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trained, "PEFT would train A again"
    for matrix in matrices.values():
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(4), atol=1e-4, rtol=0)


def test_a_second_attempt_reads_what_the_first_computed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "eva.safetensors"
    _, model, batches = made()
    first = {name: each.clone() for name, each in begin(model, batches, file).items()}
    monkeypatch.delattr(eva, "_computed")
    _, again, batches = made()
    assert all(torch.equal(each, first[name]) for name, each in begin(again, batches, file).items())


def test_of_documents_that_are_scored_all_tokens_count(cache: Path) -> None:
    """They have one label each, at their last token."""
    long = ("data.max_length=2000", "model.max_position_embeddings=2048")
    _, model, batches = made("task=reward", "data=chitchat_pairs", *long)
    (batch,) = batches.step(0)
    assert batch["trained"] == batch["documents"]
    assert len(eva._of_batch(model, batch).positions) == sum(end - start for _, start, end in batch["spans"])


def test_what_cannot_be_decomposed_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(said: str, *words: str) -> None:
        _, model, batches = made(*words)
        with pytest.raises(ConfigError, match=said):
            begin(model, batches, tmp_path / "eva.safetensors")
        assert not (tmp_path / "eva.safetensors").exists()

    refused("EVA cannot decompose the inputs of .*lm_head", "lora.target_modules=[lm_head,q_proj]")
    refused(r"needs batches of at least \d+ trained tokens", "lora.r=64", "train.per_device_batch_size=1")
    monkeypatch.setattr(eva, "MOST_PASSES", 2)
    refused("EVA's directions still change after 2 batches")
