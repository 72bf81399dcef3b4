"""The proof that a document of a batch is computed as it is alone: what it accepts, and what it detects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from fixtures import versions

from runner.errors import ConfigError
from runner.models.kernels import attention, isolation, varlen_attention

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2}
ENCODERS = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES),
    "xlnet": transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
}
CONVOLVED = versions.config("Lfm2Config", **GQA, layer_types=["conv", "full_attention"])


def build(config: Any, attention: str | None = None) -> Any:
    versions.known(config)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused_however_rows_are_laid_out(family: str) -> None:
    with pytest.raises(ConfigError, match="depend on later tokens\n    → use a model for text generation"):
        attention.check_causal(build(ENCODERS[family]), None)


def test_the_same_family_as_a_decoder_is_accepted() -> None:
    attention.check_causal(build(transformers.BertConfig(**SIZES, is_decoder=True)), None)


def test_convolutions_reach_over_the_ends_of_documents_but_not_over_rows() -> None:
    model = build(CONVOLVED)
    attention.check_causal(model, None)
    assert "attend to each other" in varlen_attention.install(model, 128)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"set data\.packing=false"):
        attention.check_isolation(model, None)


@pytest.mark.parametrize(("longest", "accepted"), [(16, True), (64, False)])
def test_chunks_matter_once_a_document_is_longer(longest: int, accepted: bool) -> None:
    """Attention by document ignores the chunks that Llama 4 sets in its mask."""
    config = versions.config(
        "Llama4TextConfig", **GQA, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16,
        no_rope_layers=[1, 0],
    )  # fmt: skip
    model = build(config)
    assert (varlen_attention.install(model, longest) == "") == accepted
    attention.check_isolation(model, None, longest)


@versions.by_document
def test_positions_of_its_own_are_detected() -> None:
    """RoBERTa counts positions from the id of the padding token, packed rows from 0."""
    sizes = {**SIZES, "pad_token_id": 1}
    model = build(transformers.RobertaConfig(**sizes, is_decoder=True, attention_probs_dropout_prob=0.0))
    attention.check_causal(model, None)
    assert "does not have the outputs that it has alone" in varlen_attention.install(model, 64)


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_that_are_no_numbers_are_detected(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(transformers.LlamaConfig(**GQA))
    inner = model.model.layers[0].mlp.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * 1.0
        hidden.register_hook(lambda gradient: gradient / 0.0)
        return inner(hidden)

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", forward)
    problem = isolation.problem(
        model, lambda batch: model(**attention.inputs(batch, packed, model)).logits, 64, None, packed=packed
    )
    assert problem == "its gradients are not finite numbers"


def test_weights_that_are_no_numbers_are_not_taken_for_mixed_documents() -> None:
    model = build(transformers.LlamaConfig(**GQA))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="its outputs are not finite numbers"):
        attention.check_causal(model, None)


def test_the_trial_is_laid_out_as_batches_are_and_reaches_beyond_windows() -> None:
    model = build(transformers.MistralConfig(**GQA, sliding_window=16))
    trial = isolation._trial(model, 64, packed=True)
    lengths = [part.stop - part.start for part in trial.documents]
    assert lengths == [4, 24, 3] * 2, "the second one is longer than the window"
    assert max(lengths) <= trial.batch["longest"]
    ends = trial.batch["document_ends"].tolist()
    assert ends[-1] == ends[-2] == trial.batch["input_ids"].numel()
    assert isolation._trial(model, 16, packed=True).reach < 16, "no document reaches the window"


def test_the_check_leaves_mode_and_random_state() -> None:
    model = build(transformers.LlamaConfig(**GQA)).eval()
    state = torch.get_rng_state()
    attention.check_causal(model, None)
    attention.check_isolation(model, None)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
