"""What a forward pass keeps, what is computed again, and that the numbers stay the same, bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from fixtures import versions
from peft import LoraConfig, get_peft_model

from runner.config.schema import Memory
from runner.errors import ConfigError
from runner.models.kernels import activation_checkpointing, lora_linear

IDS = torch.randint(0, 64, (1, 160), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(lora: dict[str, Any] | None, **others: Any) -> Any:
    return adapted(transformers.LlamaConfig(**SMALL, intermediate_size=48, **others), lora)


def adapted(config: Any, lora: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(versions.known(config))
    if lora is not None:
        options = {"target_modules": "all-linear", "init_lora_weights": False, **lora}
        model = get_peft_model(model, LoraConfig(**options))
        lora_linear.fuse(model)
    return model.train()


def step(model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(IDS, use_cache=False).logits.float().square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("memory", ["speed", "balanced", "min", "offload"])
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}, {"use_dora": True}, None], ids=repr)
def test_the_numbers_stay_the_same_bit_for_bit(lora: dict[str, Any] | None, memory: Memory) -> None:
    expected, model = step(llama(lora)), llama(lora)
    activation_checkpointing.arrange(model, memory)
    assert_same(step(model), expected)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, llama(lora).eval()(IDS).logits)


@pytest.mark.parametrize("memory", ["speed", "balanced"])
def test_they_stay_so_under_autocast_and_in_families_with_other_norms_and_gates(memory: Memory) -> None:
    sizes = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
    of_phi = transformers.Phi3Config(**sizes, pad_token_id=0)
    for config in (versions.config("Qwen3Config", **sizes), transformers.GemmaConfig(**sizes), of_phi):
        for dtype in (None, torch.bfloat16):
            expected, model = step(adapted(config, {}), dtype), adapted(config, {})
            activation_checkpointing.arrange(model, memory)
            assert_same(step(model, dtype), expected)


@pytest.mark.parametrize(
    ("memory", "times"),
    [
        ("speed", {"gate_proj": 1, "down_proj": 1, "q_proj": 1, "input_layernorm": 2}),
        ("balanced", {"gate_proj": 2, "down_proj": 1, "q_proj": 1, "input_layernorm": 2}),
        ("min", {"gate_proj": 2, "down_proj": 2, "q_proj": 2, "input_layernorm": 2}),
    ],
)
def test_what_is_computed_again_is_computed_once(memory: Memory, times: dict[str, int]) -> None:
    model, counted = llama({}), Counter[str]()
    layer = model.get_decoder().layers[1]
    for name, module in layer.named_modules():
        module.forward = counting(module.forward, counted, name.rpartition(".")[2])
    activation_checkpointing.arrange(model, memory)
    counted.clear()  # a trial of the MLP
    step(model)
    assert {name: counted[name] for name in times} == times


def counting(forward: Any, counted: Counter[str], name: str) -> Any:
    def count(*args: Any, **kwargs: Any) -> Any:
        counted[name] += 1
        return forward(*args, **kwargs)

    return count


@pytest.mark.parametrize("memory", ["speed", "balanced"])
def test_nothing_is_held_once_the_gradients_are_there(memory: Memory) -> None:
    model = llama({})
    activation_checkpointing.arrange(model, memory)
    made: list[weakref.ref[torch.Tensor]] = []
    model.get_decoder().layers[0].mlp.gate_proj.register_forward_hook(lambda *args: made.append(weakref.ref(args[2])))
    step(model)
    gc.disable()
    try:
        step(model)
        assert len(made) >= 2
        assert [tensor() for tensor in made] == [None] * len(made)
    finally:
        gc.enable()


def test_dropout_in_one_layer_is_drawn_once() -> None:
    def model() -> Any:
        return llama({"lora_dropout": 0.3, "target_modules": r".*layers\.1\..*_proj"})

    expected, found = step(model()), model()
    activation_checkpointing.arrange(found, "balanced")
    assert_same(step(found), expected)


@pytest.mark.parametrize("memory", ["speed", "balanced"])
def test_experts_beside_a_gated_mlp(memory: Memory) -> None:
    sizes = {**SMALL, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = transformers.Qwen2MoeConfig(**sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    expected, model = step(adapted(config)), adapted(config)
    activation_checkpointing.arrange(model, memory)
    assert_same(step(model), expected)


def test_a_result_that_is_saved_in_another_order_is_kept() -> None:
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.RMSNorm(4), torch.nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x.transpose(0, 1)).transpose(0, 1).contiguous())

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Turned(), Turned()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(layer(x).square().sum() for layer in self.layers)  # type: ignore[return-value]

    def gradients(memory: Memory | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Model()
        if memory:
            activation_checkpointing.arrange(model, memory)
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).backward()
        return [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]

    assert all(map(torch.equal, gradients("speed"), gradients(None)))


def test_an_activation_that_is_trained_has_its_gradient() -> None:
    if "prelu" not in transformers.activations.ACT2FN:
        pytest.skip(f"needs a newer transformers: {transformers.__version__} has no trained activation")
    expected, model = step(llama(None, hidden_act="prelu")), llama(None, hidden_act="prelu")
    assert any("act_fn" in name for name in expected)
    activation_checkpointing.arrange(model, "speed")
    assert_same(step(model), expected)


def test_an_mlp_of_another_kind_is_left_as_it_is() -> None:
    class Doubled(transformers.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def doubled() -> Any:
        model = llama({})
        for layer in model.get_decoder().layers:
            layer.mlp.__class__ = Doubled
        return model

    expected, model = step(doubled()), doubled()
    activation_checkpointing.arrange(model, "balanced")
    assert_same(step(model), expected)


def test_layers_without_an_mlp_of_their_own_are_refused() -> None:
    config = transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)
    with pytest.raises(
        ConfigError, match=r"train\.memory=balanced: OPTDecoderLayer has no MLP module(.|\n)*speed or min"
    ):
        activation_checkpointing.arrange(adapted(config), "balanced")
    activation_checkpointing.arrange(adapted(config), "min")
    with pytest.raises(ConfigError, match="no list of decoder layers of one class"):
        activation_checkpointing.arrange(torch.nn.Linear(2, 2), "min")


def test_what_keeps_a_part_of_the_opened_gate_has_it_to_itself() -> None:
    """The next layer's lies in the same memory."""

    class Part(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x[..., : self.in_features // 2], self.weight[:, : self.in_features // 2])

    def parted() -> Any:
        model = adapted(transformers.LlamaConfig(**SMALL, intermediate_size=48))
        for layer in model.get_decoder().layers:
            layer.mlp.down_proj.__class__ = Part
        return model

    expected, model = step(parted()), parted()
    activation_checkpointing.arrange(model, "speed")
    assert_same(step(model), expected)


def test_opened_gates_of_all_layers_lie_in_one_place() -> None:
    places: list[int] = []
    model = llama({})
    activation_checkpointing.arrange(model, "speed")
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: places.append(args[0].data_ptr()))
    step(model)
    assert len(places) == 2
    assert len(set(places)) == 1
