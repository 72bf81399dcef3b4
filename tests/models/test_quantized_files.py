"""Models whose files are quantized: trained as they are, dequantized, or refused before training."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, option
from fixtures import versions
from fixtures.model_folders import change_config, folder, ids, local, source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from runner.cli import main
from runner.errors import ConfigError
from runner.models import architecture, pretrained
from runner.models.kernels import compat
from runner.models.quantization import none
from runner.models.sources import ModelSource
from runner.tracking import manifest
from runner.tracking.rundir import RunDir
from runner.train import trained_model

LOCAL = ("model=local", *(word for word in TINY if word != "model=tiny"), "train.max_steps=2")
BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def store(folder: Path, kind: str) -> None:
    """Quantize the files of a folder with bitsandbytes."""
    if not torch.cuda.is_available() and not compat.at_least("transformers", "4.53"):
        pytest.skip("needs transformers 4.53: 8-bit and 4-bit weights on a CPU")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**BITS[kind]))
    model.save_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids(), use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", BITS)
def test_bitsandbytes_files_train_as_they_are(
    kind: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    store(folder, kind)
    monkeypatch.chdir(folder.parent)
    words = [*LOCAL, f"model.path={folder}"]
    assert main.run(["plan", *words]) == 0
    assert f"weights in {kind} (bitsandbytes)" in capsys.readouterr().out
    assert main.run([*words, "hydra.run.dir=run"]) == 0
    assert f"weights in {kind} (bitsandbytes)" in capsys.readouterr().err
    run = RunDir(folder.parent / "run")
    ours = logits(trained_model.load(trained_model.Trained(run, manifest.read_config(run)), "cpu"))
    base = AutoModelForCausalLM.from_pretrained(folder, **versions.FLOAT32)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # else it is computed in bfloat16
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, run.model)), ours, atol=1e-4, rtol=1e-4)
    assert main.run(["export", "run", "merged", "--merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("merged", **versions.FLOAT32)
    assert not hasattr(merged.config, "quantization_config")
    rounding = {"nf4": 1e-3, "int8": 2e-2}[kind]  # products of 8-bit weights round the activations, too
    torch.testing.assert_close(logits(merged), ours, atol=rounding, rtol=rounding)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("quant=4bit",), "quant=nf4 (bitsandbytes): the weights of mine are quantized already (bitsandbytes)"),
        (("lora=none",), "lora=none: full fine-tuning does not support quantized weights"),
        (("lora=pissa",), "lora.init_lora_weights=pissa_niter_16: needs unquantized base weights"),
    ],
)
def test_what_needs_other_weights_is_refused_by_plan(
    options: tuple[str, ...], said: str, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(folder, "nf4")
    assert main.run(["plan", *LOCAL, f"model.path={folder}", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["aqlm", "hqq", "newest"])
def test_other_methods_are_refused_with_their_name(name: str, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": name, "bits": 4})
    with pytest.raises(ConfigError) as refused:
        architecture.read(local(folder))
    assert (
        f"its weights are quantized ({name}); only those of bitsandbytes, mxfp4, fp8, compressed-tensors, gptq, awq"
        in str(refused.value)
    )
    assert "use the original model, and quantize it with quant=4bit" in str(refused.value)


def test_compressed_tensors_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    change_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"})
    with pytest.raises(ConfigError, match="the package compressed-tensors is not installed"):
        architecture.read(local(folder))


def dequantized_as_transformers_does(folder: Path, config: Any) -> None:
    """Loaded by us: the weights that transformers dequantizes; with LoRA they train, and no 8-bit weight is left."""
    model = pretrained.load(local(folder, dtype="float32"), none.none(), "cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **versions.FLOAT32)
    assert torch.equal(logits(model), logits(plain))
    assert not hasattr(model.config, "quantization_config")
    pretrained.save_whole(model, folder / "whole", model.state_dict())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "whole")), logits(model))
    adapted = option("lora", "lora")(model)
    adapted(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


@versions.transformers_5
def test_fp8_is_dequantized(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    stored = {}
    for name, weight in weights.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        scale = weight.abs().max() / 448
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1).float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(
        folder,
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    )
    dequantized_as_transformers_does(folder, transformers.FineGrainedFP8Config(dequantize=True))


@pytest.mark.extras
def test_compressed_tensors_are_dequantized(folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if "_proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 448
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.float()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    change_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    )
    dequantized_as_transformers_does(folder, transformers.CompressedTensorsConfig(dequantize=True))


@versions.transformers_5
def test_mxfp4_is_dequantized(folder: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    stored = {}
    for name, weight in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, columns, rows = weight.shape  # stored as (experts, rows, blocks of 32 values, 16 bytes)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 120, dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    dequantized_as_transformers_does(folder, transformers.Mxfp4Config(dequantize=True))
