"""One model over the ranks of a run: forward, backward and clipping, whatever lies between the processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.models import shards
from runner.models.kernels import compilation
from runner.tasks.task import Task
from runner.train.distributed.parallel import Parallel
from runner.train.distributed.ranks import Ranks

Batch = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A model in place on its ranks."""

    forward: Callable[[Batch], dict[str, Tensor]]
    """A batch → the task's sums; the gradients that follow are averaged over the ranks."""
    accumulating: Callable[[bool], AbstractContextManager[Any]]
    """Around forward and backward of a micro-batch; False: more follow, and gradients may be exchanged later."""
    device: torch.device
    autocast: torch.dtype | None
    """What is computed in this dtype where it is safe; None: in that of the weights."""

    def computing(self) -> AbstractContextManager[Any]:
        """Around each forward pass."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def on_device(self, batch: Batch) -> Batch:
        device = self.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def wrap(
    parallel: Parallel, model: nn.Module, task: Task, ranks: Ranks, device: torch.device, autocast: torch.dtype | None
) -> Spread:
    """Put the model in place; with ``fsdp`` its parameters are other objects from now on."""

    def plain(batch: Batch) -> dict[str, Tensor]:
        return task.loss(model, batch)

    def at_once(last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    match parallel.kind:
        case "none":
            return Spread(plain, at_once, device, autocast)
        case "ddp":
            copied = _replicated(parallel, _Forward(model, task))
            return Spread(copied, lambda last: contextlib.nullcontext() if last else copied.no_sync(), device, autocast)
        case "fsdp":
            # Gradients are exchanged after each micro-batch: kept until the last they would be whole on each rank.
            _shard(parallel, model, ranks, device)
            return Spread(plain, at_once, device, autocast)


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to this norm, taken over all parameters and ranks; returns the norm they had, ()."""
    return shards.whole(nn.utils.clip_grad_norm_(model.parameters(), limit))


class _Forward(nn.Module):
    """The step from a batch to its sums as a module: what DistributedDataParallel can wrap."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.loss(self.model, batch)


def _replicated(parallel: Parallel, forward: _Forward) -> nn.parallel.DistributedDataParallel:
    """Frozen weights are left out: each rank has read them from the same file, quantized ones cannot be compared."""
    frozen = [name for name, parameter in forward.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in forward.named_buffers()]
    wrapper = nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(forward, [*frozen, *buffers])
    return wrapper(
        forward,
        find_unused_parameters=parallel.find_unused_parameters,
        bucket_cap_mb=parallel.bucket_cap_mb,
    )


def _shard(parallel: Parallel, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Each decoder layer is a unit that is gathered when it is computed; what is left (embeddings, head) is another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.world,))
    for layer in compilation.decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=parallel.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")  # it calls the base model inside an adapter, past the root's hooks
