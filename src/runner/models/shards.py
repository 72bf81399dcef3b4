"""Convert between sharded tensors (DTensor) and full tensors: files always contain full tensors."""

from __future__ import annotations

from typing import Any

import torch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; gathers a sharded one, so every rank must call this."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def like(tensor: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Shard ``full`` in the same way as ``tensor``; returns it unchanged if ``tensor`` is not sharded."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    return distribute_tensor(full.to(tensor.dtype), sharded.device_mesh, sharded.placements)


def gathered(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """Full tensors by name. Sharded tensors are gathered one at a time and moved to the CPU; None unless ``keep``.

    A tensor under two names (tied weights) stays one tensor and is written once.
    """
    seen: dict[int, Any] = {}
    for value in state.values():
        if id(value) not in seen:
            seen[id(value)] = _gathered(value, keep) if isinstance(value, torch.Tensor) else value
    return {name: seen[id(value)] for name, value in state.items()}


def _gathered(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    if not is_sharded(tensor):
        return tensor.detach()
    full = whole(tensor.detach())
    return full.cpu() if keep else None


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with full tensors; every rank must call this."""
    state_dict = optimizer.state_dict()
    return {**state_dict, "state": {i: gathered(state, keep=keep) for i, state in state_dict["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the result of ``optimizer_state``; shards the state in the same way as the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {i: _shard(parameters[i], state) for i, state in state_dict["state"].items()}
    optimizer.load_state_dict({**state_dict, "state": sharded})


def _shard(parameter: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """One parameter's optimizer state: tensors of the parameter's shape are sharded, others (step counts) are not."""
    return {
        name: like(parameter, value) if isinstance(value, torch.Tensor) and value.shape == parameter.shape else value
        for name, value in state.items()
    }
