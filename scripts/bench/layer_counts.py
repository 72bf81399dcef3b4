"""What one decoder layer costs in a training step: operations, bytes and FLOPs, counted without computing anything.

    python scripts/bench/layer_counts.py [CASE ...]

The step is dispatched on tensors without content (torch's FakeTensorMode) with three and with four decoder layers; the
difference is one layer. The operations are those of eager mode on a GPU, except that the attention by document is the
CPU's operation. Compiled layers fuse most of what is no product: their bytes are counted in the code that Inductor
generates, see tests/models/kernels. tests/train/test_layer_counts.py fails if a change adds passes over memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from runner.config.schema import Memory
from runner.models.dtypes import dtype_argument
from runner.models.kernels import activation_checkpointing, lm_head, lora_linear, varlen_attention
from runner.tasks import cross_entropy
from runner.train.memory import peak

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
ROWS, LENGTH = 2, 4096
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "add_product_")
FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "expand", "alias",
    "detach", "split", "split_with_sizes", "as_strided", "unbind", "reshape", "chunk", "lift_fresh", "device", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip
"""Operations that read and write no elements."""
MEMORY_BYTES_S, PRODUCTS_FLOPS = 4.0e12, 790e12
"""Assumed of an H200, to compare the parts: bytes of memory a second, and FLOP/s of large bfloat16 products."""


@dataclass(frozen=True)
class Layer:
    """The cost of one decoder layer, forward and backward, with ROWS documents of LENGTH tokens."""

    operations: Counter[str]
    """Operation → how often it is started."""
    bytes: Counter[str]
    """Operation → bytes that it reads and writes."""
    flops: int
    """FLOPs of its matrix products; attention is not counted."""

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of all operations that are neither a matrix product nor attention."""
        return sum(size for name, size in self.bytes.items() if name not in PRODUCTS and "attention" not in name)

    @property
    def product_bytes(self) -> int:
        return sum(self.bytes[name] for name in PRODUCTS)

    def passes(self, hidden_size: int, itemsize: int = 2) -> float:
        """``elementwise_bytes`` in tensors of hidden states (tokens, hidden_size), each read or written once."""
        return self.elementwise_bytes / (ROWS * LENGTH * hidden_size * itemsize)


def of_layer(shape: dict[str, Any], *, lora: bool, memory: Memory | None = "speed", fused: bool = True) -> Layer:
    """Count one layer of a Llama of this shape in bfloat16.

    Args:
        lora: train LoRA adapters of rank 16 on all linear layers, else all weights.
        memory: ``train.memory``; None: as transformers computes it, without this package's activation checkpointing.
        fused: LoRA layers of this package, else those of PEFT.
    """
    fewer, more = (_counted(shape, layers, lora, memory, fused) for layers in (3, 4))
    return Layer(
        more.operations - fewer.operations, more.bytes - fewer.bytes, more.flops - fewer.flops
    )  # a Counter keeps what is positive; every layer adds


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes, self.flops = Counter[str](), Counter[str](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name in FREE:
            return result
        read = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): _size(t) for t in _tensors(args)}
        read |= {id(t): _size(t) for key, value in (kwargs or {}).items() if key != "out" for t in _tensors(value)}
        written = args[0] if name == "add_product_" else result
        self.operations[name] += 1
        self.bytes[name] += sum(read.values()) + sum(map(_size, _tensors(written)))
        if name in PRODUCTS:
            first, second = [t for t in args if isinstance(t, Tensor)][-2:]
            self.flops += 2 * first.numel() * second.shape[-1]
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_iter(tree) if isinstance(value, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that exist: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _counted(shape: dict[str, Any], layers: int, lora: bool, memory: Memory | None, fused: bool) -> _Count:
    model = _model(shape, layers, lora, fused)
    varlen_attention.adopt(model)
    if memory is not None:
        activation_checkpointing.arrange(model, memory)
    with FakeTensorMode():
        peak.give_storage(model, torch.device("cpu"))
        lm_head.adopt(model)
        ids = torch.zeros(1, ROWS * LENGTH, dtype=torch.int64)
        ends = torch.zeros(ROWS + 1, dtype=torch.int32)
        inputs = {"input_ids": ids, "position_ids": ids, **varlen_attention.arguments(ends, LENGTH)}
        with _Count() as count:
            cross_entropy.rehearsal(model.train(), inputs, torch.zeros(ROWS, dtype=torch.int64)).backward()
    return count


def _model(shape: dict[str, Any], layers: int, lora: bool, fused: bool) -> Any:
    config = transformers.LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=LENGTH)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, **dtype_argument(torch.bfloat16))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    if fused:
        lora_linear.fuse(adapted)
    return adapted


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8b-lora": (LLAMA_8B, {"lora": True}),
    "8b-lora-balanced": (LLAMA_8B, {"lora": True, "memory": "balanced"}),
    "8b-lora-peft": (LLAMA_8B, {"lora": True, "memory": None, "fused": False}),
    "1b-full": (LLAMA_1B, {"lora": False}),
    "1b-full-transformers": (LLAMA_1B, {"lora": False, "memory": None}),
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"{unknown[0]}: no such case; they are {', '.join(CASES)}")
    print("| case | operations | GB, neither products nor attention | passes over the hidden states | GB of products "
          "| TFLOP of products |\n|---|---|---|---|---|---|")  # fmt: skip
    for name in names or CASES:
        shape, options = CASES[name]
        layer = of_layer(shape, **options)
        passes = layer.passes(int(shape["hidden_size"]))
        sizes = layer.elementwise_bytes / 1e9, layer.product_bytes / 1e9, layer.flops / 1e12
        cells = (
            name,
            f"{layer.operations.total()}",
            f"{sizes[0]:.2f}",
            f"{passes:.0f}",
            *(f"{n:.2f}" for n in sizes[1:]),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
