"""Packed documents do not see each other."""

from __future__ import annotations

import pytest
import torch
import transformers
from fixtures import versions
from fixtures.language_models import FAMILIES, PACKS, batch_of, build, gradients, with_virtual_tokens
from peft import LoraConfig, get_peft_model

from runner.errors import ConfigError
from runner.models.kernels import attention, compat
from runner.tasks import cross_entropy

MIXING = {
    "opt": transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "falcon": transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name == "phi3")) for name in FAMILIES]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_are_as_alone(family: str, implementation: str) -> None:
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 caps its attention scores, which sdpa cannot")
    model, batch = build(FAMILIES[family], implementation).eval(), batch_of(PACKS)
    with torch.no_grad():
        together = model(**attention.inputs(batch, True, model)).logits
        for row, sizes in enumerate(PACKS):
            for ids, logits in zip(batch["input_ids"][row].split(sizes), together[row].split(sizes), strict=True):
                alone = model(input_ids=ids[None], use_cache=False).logits[0]
                torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    attention.check_isolation(model, None)


@pytest.mark.parametrize("family", MIXING)
@versions.masks_by_position
def test_a_model_that_mixes_documents_is_refused(family: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.packing=True: .* attend to each other\n    → set data\.packing=false"
    ):
        attention.check_isolation(build(MIXING[family]), None)


@versions.by_document
def test_the_check_leaves_no_trace_and_sees_through_lora() -> None:
    model = get_peft_model(build(FAMILIES["mistral"]), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    state = torch.get_rng_state()
    attention.check_isolation(model, None)
    assert torch.equal(state, torch.get_rng_state())
    assert not gradients(model)
    assert not model.get_input_embeddings()._forward_hooks


def test_prompt_tuning_cannot_be_packed() -> None:
    tuned = with_virtual_tokens(build(FAMILIES["llama"]))
    with pytest.raises(ConfigError, match="packing"):
        attention.check_isolation(tuned, None)


@versions.masks_by_position
def test_the_mask_for_an_older_transformers_isolates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(FAMILIES["llama"]), batch_of(PACKS)
    expected = cross_entropy.sums(model, batch)
    monkeypatch.setattr(compat, "masks_by_position", lambda: False)
    asked = attention.inputs(batch, True, model)
    assert asked["attention_mask"].shape == (2, 1, 20, 20)
    torch.testing.assert_close(cross_entropy.sums(model, {**batch, **asked}), expected, atol=1e-5, rtol=1e-6)
    attention.check_isolation(model, None)
    with pytest.raises(ConfigError, match="sliding window of 4"):
        attention.inputs(batch, True, build(FAMILIES["mistral"]))


@versions.masks_by_position
def test_flash_attention_gets_one_row() -> None:
    model, batch = build(FAMILIES["llama"]), batch_of(PACKS)
    expected = cross_entropy.sums(model, batch)
    model.config._attn_implementation_internal = "flash_attention_2"
    asked = attention.inputs(batch, True, model)
    model.config._attn_implementation_internal = "sdpa"
    assert asked["input_ids"].shape == asked["position_ids"].shape == (1, 40)
    torch.testing.assert_close(cross_entropy.sums(model, {**batch, **asked}), expected, atol=1e-5, rtol=1e-6)


def test_without_packing_attention_is_plainly_causal() -> None:
    model, batch = build(FAMILIES["llama"]), batch_of([[20], [20]])
    asked = attention.inputs(batch, False, model)
    assert asked["input_ids"].shape == (2, 20)
    assert "attention_mask" not in asked
