"""LoftQ: the adapter begins as what 4-bit weights lose, as in the paper, and stays with the base it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import TINY, composed, prepared
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from runner.cli import export
from runner.errors import ConfigError
from runner.models import loftq_base, pretrained
from runner.models.quantization import loftq
from runner.tracking import manifest
from runner.train import build, inputs, merge, trained_model, worker
from runner.train.inputs import Inputs
from runner.train.options import Options

LOFTQ = ("quant=4bit", "lora.init_lora_weights=loftq", "lora.r=4", "lora.lora_alpha=12", "data.packing=false")


def of_paper(weight: Tensor, rank: int, iterations: int, kind: str, double: bool) -> tuple[Tensor, Tensor]:
    """(Q, A·Bᵀ) of algorithm 1 of https://arxiv.org/abs/2310.08659, written from its text, in float64."""
    product = torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(iterations):
        packed, state = quantize_4bit((weight.double() - product).float(), quant_type=kind, compress_statistics=double)
        q = dequantize_4bit(packed, state).double()
        u, s, v = torch.svd(weight.double() - q)
        product = sum(s[i] * torch.outer(u[:, i], v[:, i]) for i in range(rank))
    return q, product


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_best_product_is_that_of_the_singular_values(scale: float) -> None:
    matrix = scale * torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    b, a = loftq.low_rank(matrix, 5)
    torch.testing.assert_close((b @ a).double(), u[:, :5] * s[:5] @ vh[:5], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))  # each has the root of the singular value


def begun(tmp_path: Path, *words: str) -> tuple[Inputs, Any]:
    """The inputs of a run, and its model before the first step."""
    given = inputs.inputs(Options(composed(*TINY, *LOFTQ, *words)))
    return given, build.load_model(given, tmp_path / loftq_base.FILE)


def layers(given: Inputs, model: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name of each adapted layer → (W, Q, s·B·A)."""
    plain, found = pretrained.mapped(given.source), {}
    for name, layer in loftq._adapted(model):
        base = layer.base_layer.weight
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        found[name] = plain.get_submodule(name).weight, dequantize_4bit(base.data, base.quant_state), update
    return found


@pytest.mark.parametrize(
    ("words", "iterations", "kind", "double"),
    [((), 1, "nf4", True), (("lora.loftq_iter=4", "quant=fp4", "lora.use_rslora=true"), 4, "fp4", False)],
)
def test_the_first_weights_are_those_of_the_paper(
    cache: Path, tmp_path: Path, words: tuple[str, ...], iterations: int, kind: str, double: bool
) -> None:
    """The products within 1e-5 of the largest value; without several iterations Q is the plain 4-bit weight."""
    given, model = begun(tmp_path, *words)
    found = layers(given, model)
    assert len(found) == 14
    for w, q, update in found.values():
        expected_q, product = of_paper(w, 4, iterations, kind, double)
        before = torch.linalg.norm(w - sum(of_paper(w, 4, 1, kind, double)))
        assert torch.linalg.norm(w - q - update) < before * (0.99 if iterations > 1 else 1.0001)
        assert (q - expected_q).abs().max() <= 1e-6
        assert (update - product).abs().max() <= 1e-5 * product.abs().max()
        plain = dequantize_4bit(*quantize_4bit(w.detach(), quant_type=kind, compress_statistics=double))
        assert torch.linalg.norm(w - q - update) < 0.95 * torch.linalg.norm(w - plain)


def trained(tmp_path: Path, *words: str) -> trained_model.Trained:
    """A run of two steps that has ended."""
    rundir = prepared(tmp_path / "run", *TINY, *LOFTQ, "train.max_steps=2", "optim.learning_rate=1e-2", *words)
    assert worker.work(rundir) == 0
    return trained_model.Trained(rundir, manifest.read_config(rundir))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_trained_adapter_keeps_its_base(cache: Path, tmp_path: Path, iterations: int) -> None:
    """Quantized as in training, merged into unquantized weights, and read by plain PEFT (after one iteration)."""
    run = trained(tmp_path, f"lora.loftq_iter={iterations}")
    parts = {name.rpartition(".")[2] for name in load_file(run.rundir.model / loftq_base.FILE)}
    assert parts == ({"before_a", "before_b"} if iterations > 1 else set()), "nothing more is beside the adapter"
    model = trained_model.load(run, "cpu")
    expected = logits(model)
    assert trained_model.has_base_inside(model) == (iterations == 1)
    merge.write(run, tmp_path / "merged", None)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    if iterations == 1:
        code = {"BitsAndBytesConfig": transformers.BitsAndBytesConfig}
        quantized = eval(loftq_base.library_code(run.rundir.model), code)
        base = transformers.AutoModelForCausalLM.from_pretrained(run.base.path, quantization_config=quantized)
        run.quant.after_load(base)  # else its kernel for inference rounds to bfloat16
        read = PeftModel.from_pretrained(base, run.rundir.model)
        torch.testing.assert_close(logits(read), expected, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ConfigError, match="3 iterations of LoftQ quantized the base"):
            export.main([str(run.rundir.path)])
