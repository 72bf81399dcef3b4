"""longrope: a document of a batch has the frequencies that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from fixtures import versions

from runner.models.kernels import attention, long_rope, varlen_attention

ORIGINAL = 16
LENGTHS = [20, 5, 12]
WIDTH = 48


def build(*, installed: bool) -> Any:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, original_max_position_embeddings=ORIGINAL, pad_token_id=0,
        rope_scaling={"type": "longrope", "rope_type": "longrope", **factors},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    if installed:
        long_rope.install(model)
    return model


def documents() -> list[torch.Tensor]:
    return [torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]


def batch(packed: bool) -> dict[str, Any]:
    rows = [documents()] if packed else [[document] for document in documents()]
    ids, positions = torch.zeros(2, len(rows), WIDTH, dtype=torch.int64)
    ends = [0]
    for row, members in enumerate(rows):
        start = 0
        for document in members:
            end = start + len(document)
            ids[row, start:end], positions[row, start:end] = document, torch.arange(len(document))
            ends.append(row * WIDTH + end)
            start = end
        ends.append((row + 1) * WIDTH)
    document_ends = torch.tensor(ends, dtype=torch.int32)
    boundaries = {"document_ends": document_ends, "longest": max(LENGTHS), "attention_parts": ()}
    return {"input_ids": ids, "position_ids": positions, **boundaries}


@torch.no_grad()
def differences(model: Any, packed: bool) -> list[float]:
    """The largest difference of a document's logits in a batch from those alone, for each document."""
    rows = batch(packed)
    logits = model(**attention.inputs(rows, packed, model)).logits.reshape(-1, 64)
    ends, found = rows["document_ends"].tolist(), []
    starts = [end for end in ends if end % WIDTH in ({0, 20, 25} if packed else {0})]
    for start, document in zip(starts, documents(), strict=False):
        alone = build(installed=False)(document[None], use_cache=False).logits[0]
        found.append(float((logits[start : start + len(document)] - alone).abs().max()))
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("by_document", [True, False])
@versions.rope_parameters
def test_each_document_has_the_factors_of_its_own_length(packed: bool, by_document: bool) -> None:
    model = build(installed=True)
    assert not by_document or varlen_attention.install(model, max(LENGTHS)) == ""
    assert max(differences(model, packed)) < 1e-4


@pytest.mark.parametrize("packed", [True, False])
@versions.rope_parameters
def test_without_it_one_long_document_changes_the_others(packed: bool) -> None:
    long, *short = differences(build(installed=False), packed)
    assert long < 1e-4
    assert min(short) > 1e-2


def test_other_models_are_left_alone() -> None:
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    long_rope.install(model)
    assert not long_rope.uses(model)
    assert "forward" not in vars(model.model.rotary_emb)
