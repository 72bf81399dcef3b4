"""Memory for time: what of a decoder layer's forward pass is kept for the backward pass, and what is computed again.

``speed`` keeps everything. ``balanced`` keeps the input of a layer and the results of its matrix products and of its
attention, which cost most, and computes norms, activations and rotations again. ``min`` keeps the input alone and
computes the layer again. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from runner import compiling, fused

Memory = Literal["speed", "balanced", "min"]
"""``train.memory``."""
SHORT = 256
"""A product of a shorter inner dimension (LoRA's) is computed in less time than its result is written and read."""


def arrange(model: nn.Module, memory: Memory) -> None:
    """Let the decoder layers of ``model`` keep no more than that. In place; before compiling.

    Raises:
        ConfigError: the model has no list of decoder layers.
    """
    if memory == "speed":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if memory == "balanced":
        fused.keep_products(model)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in compiling.decoder_layers(model):
        layer.forward = _recomputed(layer.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return again


def _policy(_: object, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_costly(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_costly(operation: Any, args: tuple[Any, ...]) -> bool:
    name = str(operation)
    if name in ("aten.mm.default", "aten.bmm.default", "aten.addmm.default"):
        left: Tensor = args[-2]  # (n, K) of the product
        return left.shape[-1] >= SHORT
    return "attention" in name or name.startswith("bitsandbytes.int8_")
