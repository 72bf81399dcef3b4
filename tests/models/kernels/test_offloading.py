"""What waits in the memory of the CPU for the backward pass: the input of each layer, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from runner.models.kernels import activation_checkpointing, offloading

CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)


def test_the_input_of_each_layer_waits_there_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the copies are made, too: only the bus is missing."""
    model, inputs, saved = transformers.LlamaForCausalLM(CONFIG).train(), list[torch.Tensor](), list[torch.Tensor]()
    to_cpu = offloading.to_cpu

    def watched(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        device, copy = to_cpu(tensor)
        saved.extend([copy] * bool(copy.numel()))  # torch 2.5 also keeps an empty tensor for each layer
        return device, copy

    monkeypatch.setattr(offloading, "to_cpu", watched)
    activation_checkpointing.arrange(model, "offload")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    model(torch.arange(48)[None], use_cache=False).logits.square().mean().backward()
    assert len(saved) == len(inputs) == CONFIG.num_hidden_layers
    assert all(map(torch.equal, saved, inputs))
    assert all(copy.data_ptr() != given.data_ptr() for copy, given in zip(saved, inputs, strict=True))


def test_a_tensor_comes_back_as_it_was() -> None:
    given: Any = torch.arange(12.0).reshape(3, 4).t()
    device, copy = offloading.to_cpu(given)
    given_again = offloading.to_device((device, copy))
    assert torch.equal(given_again, given)
    assert given_again.stride() == given.stride(), "a kernel may round otherwise with another order in memory"
