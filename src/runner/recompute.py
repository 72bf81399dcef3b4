"""Memory for time: what of a decoder layer's forward pass is kept for the backward pass, and what is computed again.

``speed`` keeps everything. ``balanced`` keeps the input of a layer and the results of its matrix products and of its
attention, which cost most, and computes norms, activations and rotations again. ``min`` keeps the input alone and
computes the layer again. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from runner import compiling, fused
from runner.errors import ConfigError, Fault
from runner.schema import Memory


def arrange(model: nn.Module, memory: Memory) -> None:
    """Let the decoder layers of ``model`` keep no more than that. In place; before compiling.

    Raises:
        ConfigError: the model has no list of decoder layers.
    """
    if memory == "speed":
        return
    layers = compiling.layers_of(model)
    if not layers:
        problem = f"{type(model).__name__} has no list of equal layers that could be computed again"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed", memory))
    options: dict[str, Any] = {"use_reentrant": False}
    if memory == "balanced":
        fused.keep_products(model)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in layers:
        layer.forward = _recomputed(layer.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return again


def _policy(_: object, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What becomes of the result of an operation, as torch asks at each of them."""
    return CheckpointPolicy.MUST_SAVE if _is_costly(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_costly(operation: Any, args: tuple[Any, ...]) -> bool:
    name = str(operation)
    if name in ("aten.mm.default", "aten.bmm.default", "aten.addmm.default"):
        left: Tensor = args[-2]  # (n, K) of the product
        return left.shape[-1] >= fused.SHORT
    return "attention" in name or "varlen_attn" in name or name.startswith("bitsandbytes.int8_")
