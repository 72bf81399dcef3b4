"""Fused LoRA against PEFT's own layers: the same numbers, the same names, fewer passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from conftest import option
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runner.models import freezing
from runner.models.kernels import lora_linear
from runner.models.quantization.quant import Quant

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def adapted(dtype: torch.dtype = torch.float32, bits: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if bits:
        in_bits(model, bits, dtype)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    return get_peft_model(model, config)


def in_bits(model: Any, bits: int, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            plain = getattr(layer.mlp, name)
            shape = plain.in_features, plain.out_features
            if bits == 4:
                packed: Any = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype)
            else:
                packed = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
            packed.load_state_dict({"weight": plain.weight.data})
            setattr(layer.mlp, name, packed.to("cpu"))
    model.quant = option("quant", f"{bits}bit")()


def step(model: Any, rows: int = 200) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the adapters."""
    ids = torch.randint(0, 64, (2, rows // 2), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_scale_of_rslora_counts():
    model = adapted(use_rslora=True)
    expected = step(model)
    lora_linear.fuse(model)
    torch.testing.assert_close(step(model), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("rows", [200, 20], ids=["many rows", "few rows"])
def test_numbers_are_pefts(bits: int | None, rows: int):
    model = adapted(bits=bits)
    expected = step(model, rows)
    assert lora_linear.fuse(model) == 14
    assert lora_linear.fuse(model) == 0, "once is enough"
    found = step(model, rows)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("bits", "rows", "dtype"),
    [(None, 200, torch.float32), (None, 20, torch.float32), (4, 200, torch.float32), (None, 200, torch.bfloat16)],
)
def test_numbers_are_pefts_where_a_is_frozen_and_no_input_is_kept(bits: int | None, rows: int, dtype: torch.dtype):
    model = adapted(dtype, bits=bits)
    freezing.freeze_a(model)
    expected = step(model, rows)
    lora_linear.fuse(model)
    tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 5e-2}
    torch.testing.assert_close(step(model, rows), expected, **tolerance)
    assert all(".lora_B." in name for name in expected[1])
    layer, kept = model.get_decoder().layers[0].mlp.gate_proj, []
    inputs = torch.randn(rows, layer.in_features, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        layer(inputs)
    assert inputs.shape not in kept
    assert (rows, 4) in kept, "its product with A"


class Packed(nn.Linear):
    """A linear layer of a quantization library: 8-bit weights with one scale for each row."""

    def __init__(self, dense: nn.Linear):
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, dtype=dense.weight.dtype)
        self.scale = dense.weight.detach().abs().amax(1) / 127
        self.weight = nn.Parameter((dense.weight.detach() / self.scale[:, None]).round().to(torch.int8), False)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)


@dataclass(frozen=True)
class Own(Quant):
    name: str = "int8 (my own)"
    unpacks: bool = True

    def holds(self, layer: nn.Module) -> bool:
        return isinstance(layer, Packed)

    def bytes_of(self, rows: int, columns: int) -> float:
        return rows * columns + 4 * rows

    def after_load(self, model: Any) -> None:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    if isinstance(module, nn.Linear):
                        setattr(part, name, Packed(module))

    def state(self, layer: Any) -> Tensor:
        return layer.scale

    def unpack(self, weight: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return super().unpack(weight, state, dtype, out).mul_(state[:, None])


def on_packed_weights(quant: Own, **options: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, attention_bias=True))
    quant.after_load(model)
    model.quant = quant  # type: ignore[assignment]
    return get_peft_model(
        model, LoraConfig(r=4, **{"target_modules": "all-linear", **options}, init_lora_weights=False)
    )


def without_weights(quant: Quant | None, **options: Any) -> Any:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, attention_bias=True))
    model.quant = quant
    return get_peft_model(model, LoraConfig(r=4, **{"target_modules": "all-linear", **options}))


@pytest.mark.parametrize("rows", [200, 20], ids=["many rows", "few rows"])
def test_a_back_end_of_ones_own_is_fused_whatever_class_peft_gives_its_layers(rows: int):
    """Without a change of the kernel: what counts is what a layer computes, also if its class inherits ``forward``."""
    model = on_packed_weights(Own())
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = type("TheirLoraLinear", (LoraLinear,), {})
    expected = step(model, rows)
    assert lora_linear.fuse(model) == 14
    torch.testing.assert_close(step(model, rows), expected, atol=1e-6, rtol=1e-4)


def test_layers_whose_back_end_does_not_unpack_compute_as_in_peft():
    model = on_packed_weights(Own(unpacks=False))
    expected = step(model)
    assert lora_linear.fuse(model) == 0
    torch.testing.assert_close(step(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj", "lm_head"], ["lm_head"]], ids=len)
@pytest.mark.parametrize("quant", [None, Own(), Own(unpacks=False)], ids=["none", "unpacks", "packed"])
def test_a_model_without_weights_is_fused_where_the_model_with_weights_is(quant: Own | None, targets: list[str]):
    """The estimate of the memory simulates the layers that the run computes; the LM head is never quantized."""
    loaded = on_packed_weights(quant, target_modules=targets) if quant else adapted(target_modules=targets)
    assert lora_linear.fuse(without_weights(quant, target_modules=targets)) == lora_linear.fuse(loaded)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("rows", [200, 20], ids=["many rows", "few rows"])
def test_torchao_through_the_protocol_alone(rows: int):
    """PEFT has a class of its own for these weights, which inherits the forward of its plain LoRA layer."""
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.utils import TorchAOBaseTensor

    class Torchao(Own):
        def holds(self, layer: nn.Module) -> bool:
            return isinstance(getattr(layer, "weight", None), TorchAOBaseTensor)

        def after_load(self, model: Any) -> None:
            quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())

        def state(self, layer: Any) -> Any:
            return Quant.state(self, layer)

        def unpack(self, weight: Any, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
            return Quant.unpack(self, weight.dequantize(), state, dtype, out)

    model = on_packed_weights(Torchao())
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "TorchaoLoraLinear"
    expected = step(model, rows)
    assert lora_linear.fuse(model) == 14
    torch.testing.assert_close(step(model, rows), expected, atol=1e-5, rtol=1e-4)
    plain = on_packed_weights(Torchao())
    plain.base_model.model.quant = None
    assert lora_linear.fuse(plain) == 0, "a weight that is no plain tensor, of no known back end"


def test_in_bfloat16_they_are_nearer_to_the_truth_than_its_rounding():
    truth = step(adapted())
    model = adapted(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    peft = step(model)
    lora_linear.fuse(model)
    found = step(model)
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    for name, gradient in truth[1].items():
        scale = gradient.abs().max()
        error = (found[1][name] - gradient).abs().max() / scale
        assert error < max(0.05, 2 * (peft[1][name] - gradient).abs().max() / scale), name


def operations(model: Any) -> list[str]:
    """Those of a step whose result is as large as the output of the widest layer."""
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() >= 200 * 96 and not function.is_view:
                large.append(function._schema.name)
            return out

    with Watch():
        step(model)
    return large


def test_there_are_no_passes_over_the_output_but_the_product():
    model = adapted()
    before = operations(model)
    lora_linear.fuse(model)
    after = operations(model)
    assert before.count("aten::mm") > after.count("aten::mm")
    for name in ("aten::mul", "aten::add"):
        assert after.count(name) < before.count(name), name


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_plain_is_left_to_peft(options: dict[str, Any]):
    model = adapted(**options)
    torch.manual_seed(2)
    expected = step(model)
    lora_linear.fuse(model)
    torch.manual_seed(2)
    torch.testing.assert_close(step(model), expected, atol=1e-6, rtol=1e-4)


def test_switched_off_merged_and_unmerged():
    model = adapted()
    lora_linear.fuse(model)
    adapted_logits, _ = step(model)
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    assert not torch.allclose(base, adapted_logits)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, adapted_logits, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(step(model)[0], adapted_logits, atol=1e-5, rtol=1e-4)


def test_what_is_saved_is_a_plain_peft_adapter(tmp_path):
    from peft import PeftModel

    model = adapted()
    lora_linear.fuse(model)
    expected, _ = step(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True)
    again = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_config(config), tmp_path)
    assert type(again.base_model.model.model.layers[0].mlp.up_proj).__module__.startswith("peft.")
    torch.testing.assert_close(step_logits(again), expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def step_logits(model: Any) -> Tensor:
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("bits", "backend", "dtype"),
    [(None, "aot_eager", torch.bfloat16), *(pytest.param(*way, torch.float32, marks=pytest.mark.slow) for way in
     ((None, "aot_eager"), (None, "inductor"), (4, "aot_eager"), (8, "aot_eager")))],
)  # fmt: skip
def test_compiled_it_breaks_no_graph(bits: int | None, backend: str, dtype: torch.dtype):
    """``aot_eager``: the graphs, forward and backward, without the minute of a C++ compiler."""
    model = adapted(dtype, bits=bits)
    lora_linear.fuse(model)
    expected = step(model)
    torch._dynamo.reset()
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    tolerance = {"atol": 1e-5, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 5e-2}
    torch.testing.assert_close(step(model), expected, **tolerance)


@pytest.mark.slow
def test_compiled_with_a_frozen_it_breaks_no_graph():
    model = adapted(torch.bfloat16)
    freezing.freeze_a(model)
    lora_linear.fuse(model)
    expected = step(model)
    torch._dynamo.reset()
    model.base_model.model.model.layers[1].compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model), expected, atol=1e-2, rtol=5e-2)


def layers_of_one_input(model: Any) -> list[tuple[str, ...]]:
    """The names of the layers that share the products of their input."""
    groups: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if siblings := getattr(module, "siblings", None):
            groups[id(siblings)] = (*groups.get(id(siblings), ()), name.rpartition(".")[2])
    return list(groups.values())


def test_layers_of_one_input_multiply_it_once():
    """A product of the input by all A, one for their gradients; and no sum of gradients of the input."""
    model = adapted(torch.bfloat16)
    lora_linear.fuse(model)
    assert layers_of_one_input(model) == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2
    shared = Counter(operations_of(model))
    for module in model.modules():
        if getattr(module, "siblings", None):
            module.siblings = None
    alone = Counter(operations_of(model))
    fewer = Counter({name: alone[name] - shared[name] for name in alone})
    # In each layer five products of the input by A become two, and so do those for the gradients of A. Of three layers
    # the gradient of the input is added in place: no product into a new tensor, and no sum. The input of the first
    # attention, the embeddings, has no gradient.
    assert fewer["aten::mm"] == 2 * (3 + 3 + 3) - 2
    assert fewer["aten::add"] == 2 * 3 - 2


def operations_of(model: Any) -> list[str]:
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    with Watch():
        step(model)
    return names


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"rank_pattern": {"k_proj": 2}}], ids=str
)
def test_layers_of_one_input_compute_what_each_computes_alone(options: dict[str, Any]):
    """In float64 arithmetic of few rows the order of sums is all that differs."""
    model = adapted(torch.float64, **options).double()
    expected = step(model)
    lora_linear.fuse(model)
    torch.testing.assert_close(step(model), expected, atol=1e-12, rtol=1e-9)


def test_layers_of_one_module_may_be_called_in_any_order_and_with_other_inputs():
    model = adapted(torch.float64).double()
    attention = model.base_model.model.model.layers[0].self_attn
    x, y = torch.randn(2, 1, 9, 64, dtype=torch.float64, requires_grad=True).unbind()

    def computed() -> tuple[Tensor, ...]:
        parts = attention.v_proj(x), attention.q_proj(y), attention.k_proj(y), attention.q_proj(y), attention.v_proj(x)
        total = sum(part.square().sum() * n for n, part in enumerate(parts, 1))
        return (
            *(part.detach() for part in parts),
            *torch.autograd.grad(total, (x, y, attention.q_proj.lora_A.default.weight)),
        )

    expected = computed()
    lora_linear.fuse(model)
    torch.testing.assert_close(computed(), expected, atol=1e-12, rtol=1e-9)


def test_an_input_without_a_gradient_gets_none():
    model = adapted(torch.bfloat16)
    lora_linear.fuse(model)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 9, 64, dtype=torch.bfloat16)
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function._schema.name in ("aten::mm", "aten::addmm_"):
                products.append(tuple(out.shape))
            return out

    with Watch():
        (q.sum() + k.sum() + v.sum()).backward()
    assert (9, 64) not in products
