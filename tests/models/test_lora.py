"""Adapters: what trains, what is refused, and that plain transformers and PEFT read back exactly what was trained."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import option
from fixtures import versions
from fixtures.adapters import load, logits, reloaded, train
from fixtures.model_folders import source
from transformers import AutoModelForCausalLM

from runner.errors import ConfigError
from runner.models import parameters, peft_options, pretrained, tokenizer_files
from runner.models.kernels import compat
from runner.models.quantization import bitsandbytes, none
from runner.models.sources import ModelSource

SMALL: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_layers": 2, "adapter_len": 4},
    "c3a": {"block_size": 32},
    "oft": {"oft_block_size": 8, "r": 0},
    "randlora": {"r": 8},
    "road": {"group_size": 32},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [65, 66, 67]},
    "vblora": {"vector_length": 32, "num_vectors": 16},
    "vera": {"target_modules": "all-linear", "r": 16},
    "waveft": {"n_frequency": 100},
}
"""What a model as small as ours needs; every other method runs with its own defaults."""


def test_the_start_of_every_adapter_is_the_base(source: ModelSource) -> None:
    base = logits(load(source))
    for name in ("lora", "dora", "rslora", "pissa", "lora_fa"):
        torch.testing.assert_close(logits(option("lora", name)(load(source))), base, atol=1e-4, rtol=1e-4)


def test_only_the_adapter_trains_and_in_float32(source: ModelSource) -> None:
    half = pretrained.load(ModelSource(source.path, None, "bfloat16", "auto", False, "tiny"), none.none(), "cpu")
    model = option("lora", "lora")(half)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * 14
    counts = parameters.describe(model)
    assert counts["trainable"] == counts["adapter"] == sum(p.numel() for p in trained.values())
    assert counts["dtype"] == "bfloat16"


def test_a_router_of_its_own_kind_gets_no_adapter() -> None:
    """Llama 4's is a linear layer that returns two tensors."""
    config = versions.config(
        "Llama4TextConfig",
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    model = option("lora", "lora")(AutoModelForCausalLM.from_config(versions.known(config)))
    adapted = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert adapted
    assert not any("router" in name for name in adapted)
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_full_fine_tuning_trains_everything(source: ModelSource) -> None:
    model = option("lora", "none")(load(source).requires_grad_(False))
    assert all(p.requires_grad for p in model.parameters())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("method", sorted({*peft_options.methods()} - {*peft_options.PROMPTS}))
def test_every_peft_method_trains_and_is_read_back(source: ModelSource, method: str, tmp_path: Path) -> None:
    if method in ("adaption_prompt", "loha", "lokr") and not compat.at_least("peft", "0.16"):
        pytest.skip(f"needs peft 0.16: {method} on this model")
    torch.manual_seed(0)
    model = option("lora", "peft", method=method, **SMALL.get(method, {}))(load(source))
    losses = train(model, 10)
    assert losses[-1] < losses[0] or method == "pvera"  # PVeRA samples: its loss is noisy
    pretrained.save(model, tokenizer_files.load(source), tmp_path / "model")
    torch.testing.assert_close(logits(reloaded(source, tmp_path / "model")), logits(model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", bitsandbytes.METHODS)
@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_methods_offered_on_quantized_weights_train_there(source: ModelSource, method: str, name: str) -> None:
    torch.manual_seed(0)
    base = logits(load(source, name))
    model = option("lora", "peft", method=method, **SMALL.get(method, {}))(load(source, name))
    torch.testing.assert_close(logits(model), base, atol=1e-3, rtol=1e-3)
    losses = train(model, 10)
    assert losses[-1] < losses[0] or method == "pvera"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("lora", {"r": 0}, ">= 1"),
        ("lora", {"lora_dropout": 1.0}, "< 1"),
        ("lora", {"lora_alpha": 0}, "> 0"),
        ("lora", {"rank": 8}, "no such key"),
        ("lora", {"lora_alhpa": 8}, "did you mean 'lora_alpha'?"),
        ("lora", {"init_lora_weights": "pisa"}, "did you mean 'pissa'?"),
        ("lora", {"init_lora_weights": "orthogonal", "r": 3}, "lora.r=3: must be even"),
        ("peft", {"method": "iaa3"}, "did you mean 'ia3'?"),
        ("peft", {"method": "nothing_like_it"}, "adaption_prompt, "),
        ("peft", {"method": "cpt"}, "needs more than rows of tokens"),
        ("peft", {"method": "prompt_tuning", "prompt_tuning_init_text": "hi"}, "is not supported by this train loop"),
        ("peft", {"method": "adalora"}, "after every step"),
        ("peft", {"method": "ia3", "target_module": ["q_proj"]}, "did you mean 'target_modules'?"),
        ("peft", {"method": "vera", "r": "8"}, "lora.r=8: must be a whole number"),
        ("peft", {"method": "ia3", "feedforward_modules": ["x"], "target_modules": ["y"]}, "subset"),
        ("peft", {"method": "lora", "init_lora_weights": "eva"}, "eva and loftq with lora=lora"),
        ("peft", {"method": "lora", "corda_config": {}}, "is not supported by this train loop"),
        ("peft", {"method": "lora", "task_type": "SEQ_CLS"}, "is set by the runner"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        option("lora", name, **changes)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("lora", {"target_modules": ["q_proj", "vproj"]}, "lora.target_modules=vproj: matches no module"),
        ("lora", {"target_modules": ["vproj"]}, "did you mean 'v_proj'?"),
        ("lora", {"target_modules": "q_proj"}, "linear modules: down_proj, gate_proj, k_proj, lm_head"),
        ("lora", {"target_modules": "*proj"}, "is not a valid regular expression"),
        ("lora", {"modules_to_save": ["score"]}, "lora.modules_to_save=score"),
        ("lora", {"target_modules": ["self_attn"]}, "PEFT cannot apply lora to this model"),
        ("lora", {"bias": "all"}, "the target modules of this model have no biases"),
        pytest.param(
            "peft", {"method": "c3a", "block_size": 7}, "PEFT cannot apply c3a to this model", marks=versions.peft_16
        ),
    ],
)
@pytest.mark.parametrize("real", [True, False])
def test_what_does_not_fit_the_model_is_refused(
    source: ModelSource, name: str, changes: dict[str, Any], said: str, real: bool
) -> None:
    model = load(source) if real else pretrained.empty(source, none.none())
    with pytest.raises(ConfigError) as refused:
        option("lora", name, **changes)(model)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("none", {}, "full fine-tuning does not support quantized weights"),
        ("pissa", {}, "needs unquantized base weights"),
        ("lora", {"init_lora_weights": "olora"}, "needs unquantized base weights"),
        ("peft", {"method": "lokr"}, "does not work on weights in"),
    ],
)
def test_what_quantized_weights_cannot_do_is_refused_with_and_without_weights(
    source: ModelSource, name: str, changes: dict[str, Any], said: str
) -> None:
    for model in (load(source, "4bit"), pretrained.empty(source, option("quant", "4bit")())):
        with pytest.raises(ConfigError) as refused:
            option("lora", name, **changes)(model)
        assert said in str(refused.value)
