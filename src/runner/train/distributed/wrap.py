"""Wrap the model for one process, DDP or FSDP: forward, backward and gradient clipping look the same to the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.data.collator import Batch
from runner.models import shards
from runner.models.kernels import compilation
from runner.tasks.task import Task
from runner.train.distributed import packed_weights
from runner.train.distributed.parallel import Parallel
from runner.train.distributed.ranks import Ranks


@dataclass(frozen=True)
class Wrapped:
    """The model of this rank, with DDP or FSDP applied."""

    forward: Callable[[Batch], dict[str, Tensor]]
    """Batch → the task's sums; the backward pass averages gradients over the ranks."""
    accumulating: Callable[[bool], AbstractContextManager[Any]]
    """(is last micro-batch) → context for its forward and backward pass; DDP reduces gradients only in the last."""
    device: torch.device
    autocast: torch.dtype | None
    """The dtype for torch.autocast; None: compute in the dtype of the weights."""

    def autocasting(self) -> AbstractContextManager[Any]:
        """Context for each forward pass: torch.autocast, if used."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def on_device(self, batch: Batch) -> Batch:
        return on_device(batch, self.device)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device.

    To a GPU they go through pinned memory: the host would wait for a copy from pageable memory.
    """
    return {name: _on_device(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def wrap(
    parallel: Parallel,
    model: nn.Module,
    task: Task,
    ranks: Ranks,
    device: torch.device,
    autocast: torch.dtype | None,
    dtype: torch.dtype | None = None,
) -> Wrapped:
    """Apply ``parallel`` to the model, in place; FSDP replaces its parameters.

    ``dtype``: of the shards that train, if the model may have been loaded in a narrower one; None: as loaded.
    """

    def plain(batch: Batch) -> dict[str, Tensor]:
        return task.loss(model, batch)

    def no_context(last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    match parallel.kind:
        case "none":
            return Wrapped(plain, no_context, device, autocast)
        case "ddp":
            ddp = _replicated(parallel, _Forward(model, task))
            return Wrapped(ddp, lambda last: contextlib.nullcontext() if last else ddp.no_sync(), device, autocast)
        case "fsdp":
            # Reduce gradients after each micro-batch: without it every rank would keep unsharded gradients.
            _shard(parallel, model, ranks, device, dtype)
            return Wrapped(plain, no_context, device, autocast)


def clip(model: nn.Module, limit: float) -> Tensor:
    """Clip the gradients to the norm ``limit`` over all parameters and ranks; return the norm before clipping, ()."""
    return shards.whole(nn.utils.clip_grad_norm_(model.parameters(), limit))


def reshard(model: nn.Module) -> None:
    """Drop the whole weights that FSDP has gathered for a forward pass: a change of the shards does not reach them."""
    sharded: list[Any] = [each for each in model.modules() if hasattr(each, "set_requires_gradient_sync")]
    for module in sharded:  # torch's FSDPModule
        module.reshard()


class _Forward(nn.Module):
    """Batch → sums of the task, as a module that DistributedDataParallel can wrap."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.loss(self.model, batch)


def _replicated(parallel: Parallel, forward: _Forward) -> nn.parallel.DistributedDataParallel:
    """Wrap in DDP without frozen weights: all ranks load the same file, and DDP cannot broadcast quantized weights."""
    frozen = [name for name, parameter in forward.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in forward.named_buffers()]
    wrapper = nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(forward, [*frozen, *buffers])
    return wrapper(
        forward,
        find_unused_parameters=parallel.find_unused_parameters,
        bucket_cap_mb=parallel.bucket_cap_mb,
        gradient_as_bucket_view=True,
    )


def _shard(parallel: Parallel, model: nn.Module, ranks: Ranks, device: torch.device, dtype: torch.dtype | None) -> None:
    """Apply FSDP: each decoder layer is one unit, the rest (embeddings, head) is another.

    A unit is converted to ``dtype`` just before it is sharded, so that no process holds a whole model in it. Quantized
    weights outside of the decoder layers stay whole on each rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.world,))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy()}
    if parallel.param_dtype:
        options["mp_policy"] = MixedPrecisionPolicy(getattr(torch, parallel.param_dtype), reduce_dtype=torch.float32)
    quant: Any = getattr(model, "quant", None)
    packed = packed_weights.of(model) if quant is not None and quant.shards else {}
    if packed:
        options["ignored_params"] = set(packed.values())
        packed_weights.to(device, quant, list(packed))
    for layer in compilation.decoder_layers(model):
        _convert(layer, device, dtype)
        modules = [module for module in layer.modules() if packed.pop(module, None) is not None]
        views = packed_weights.pack(layer, quant, modules, ranks.world) if modules else []
        fully_shard(layer, reshard_after_forward=parallel.reshard_after_forward, **options)
        if views:
            packed_weights.show(layer, views)
    packed_weights.to(device, quant, list(packed), whole=True)
    _convert(model, device, dtype)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "generate")  # generate() skips the root's forward hooks


def _convert(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Convert the narrower weights of a module that are not sharded yet, on the device that trains them."""
    for parameter in module.parameters():
        is_whole = not hasattr(parameter, "device_mesh")  # which the shards have, they are DTensors
        if dtype is not None and is_whole and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(device).to(dtype)
