"""GPTQ and AWQ: files that are packed as those libraries pack them are read back as the weights that they stand for."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import option
from fixtures import versions
from fixtures.model_folders import change_config, folder, ids, local, source
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from runner.errors import ConfigError
from runner.models import architecture, packed_files, parameters, pretrained
from runner.models.quantization import none

pytestmark = versions.transformers_5
GROUP = 16
AWQ_PACKS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output is in the lowest, second, … four bits of a word: ``order_map`` of AutoAWQ's ``WQLinear_GEMM``."""
GPTQ_4 = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "checkpoint_format": "gptq"}
GPTQ_8 = {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}


def word(integers: list[int], bits: int) -> int:
    """Integers in one int32, the first in the lowest bits."""
    value = sum(integer << (bits * place) for place, integer in enumerate(integers))
    return value - 2**32 if value >= 2**31 else value


def packed(integers: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Integers (n, m) in words (n, m · bits / 32)."""
    rows = [
        [word([row[start + place] for place in order], bits) for start in range(0, len(row), len(order))]
        for row in integers.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def stored(weight: Tensor, given: dict[str, Any], *, with_index: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of a layer's file, the weight (outputs, inputs) that they stand for)."""
    bits, (outputs, inputs) = given["bits"], weight.shape
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(inputs) // GROUP
    if given.get("desc_act"):
        groups = groups[torch.randperm(inputs, generator=generator)]
    integers = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 2**bits, (inputs // GROUP, outputs), generator=generator)
    scales = (torch.rand(inputs // GROUP, outputs, generator=generator) * 0.02 / 2**bits).half()
    plain = ((integers - zeros[groups]) * scales.float()[groups]).t()
    if given["quant_method"] == "awq":
        parts = {"qweight": packed(integers, 4, AWQ_PACKS), "qzeros": packed(zeros, 4, AWQ_PACKS)}
        return {**parts, "scales": scales}, plain
    order = tuple(range(32 // bits))
    less = 1 if given["checkpoint_format"] == "gptq" else 0
    parts = {"qweight": packed(integers.t(), bits, order).t(), "qzeros": packed(zeros - less, bits, order)}
    return {**parts, "scales": scales, **({"g_idx": groups.int()} if with_index else {})}, plain


@pytest.mark.parametrize("given", [GPTQ_4, GPTQ_8, AWQ], ids=["gptq in 4 bits", "gptq in 8 bits", "awq"])
def test_files_are_read_trained_and_saved_as_plain_weights(given: dict[str, Any], folder: Path) -> None:
    weights, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "q_proj" not in name and "down_proj" not in name:
            weights[name] = expected[name] = weight
            continue
        parts, expected[name] = stored(weight, given)
        weights |= {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=given)
    GenerationConfig(max_new_tokens=77).save_pretrained(folder)
    model: Any = pretrained.load(local(folder, dtype="float32"), none.none(), "cpu")
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert not hasattr(model.config, "quantization_config")
    said = f"float32, dequantized from {given['quant_method']} ({given['bits']} bits)"
    for each in (model, pretrained.empty(local(folder, dtype="float32"), none.none())):
        counts = parameters.describe(each)
        assert (counts["stored"], counts["quantized_bytes"]) == (said, 0)
    assert model.generation_config.max_new_tokens == 77
    pretrained.save_whole(model, folder / "whole", model.state_dict())
    logits = model(input_ids=ids()).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "whole")(input_ids=ids()).logits, logits)
    adapted = option("lora", "lora")(model)
    adapted(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


def test_without_an_index_groups_are_in_order_and_zeros_may_wrap() -> None:
    parts, expected = stored(torch.zeros(8, 32), GPTQ_4, with_index=False)
    assert torch.equal(packed_files.dequantized("gptq", GPTQ_4, **parts), expected)
    parts["qzeros"] = torch.full_like(parts["qzeros"], -1)  # a zero of 0, less one
    assert packed_files.dequantized("gptq", GPTQ_4, **parts).min() >= 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**GPTQ_4, "bits": 3}, "it has 3 bits, and only 2, 4, 8 can be read"),
        ({**GPTQ_4, "checkpoint_format": "marlin"}, "it is in the format marlin, and only gptq, gptq_v2 can be read"),
        ({**AWQ, "version": "gemv"}, "it is in the format gemv, and only gemm can be read"),
    ],
)
def test_other_formats_are_refused(changes: dict[str, Any], said: str, folder: Path) -> None:
    change_config(folder, quantization_config=changes)
    with pytest.raises(ConfigError) as refused:
        architecture.read(local(folder))
    assert said in str(refused.value)
    assert "use the original model, and quantize it with quant=4bit" in str(refused.value)


def test_a_part_that_is_missing_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 128, dtype=torch.int32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=GPTQ_4)
    with pytest.raises(ConfigError, match=r"the packed weight model\.layers\.0\.mlp\.up_proj\.qweight does not fit"):
        pretrained.load(local(folder), none.none(), "cpu")
