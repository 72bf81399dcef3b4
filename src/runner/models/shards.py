"""Tensors in shards over the ranks, and the same tensors whole: files hold whole ones, however a model is spread."""

from __future__ import annotations

from typing import Any

import torch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as one process would hold it; a sharded one is gathered, so every rank has to ask."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def like(tensor: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """``found``, a whole tensor, spread as ``tensor`` is."""
    if not is_sharded(tensor):
        return found
    from torch.distributed.tensor import distribute_tensor

    spread: Any = tensor
    return distribute_tensor(found.to(tensor.dtype), spread.device_mesh, spread.placements)


def gathered(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """Whole tensors by name; sharded ones come to the CPU one at a time and stay there where ``keep``.

    A tensor that stands under two names stays one: tied weights are written once.
    """
    seen: dict[int, Any] = {}
    for value in state.values():
        if id(value) not in seen:
            seen[id(value)] = _gathered(value, keep) if isinstance(value, torch.Tensor) else value
    return {name: seen[id(value)] for name, value in state.items()}


def _gathered(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    if not is_sharded(tensor):
        return tensor.detach()
    found = whole(tensor.detach())
    return found.cpu() if keep else None


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors."""
    found = optimizer.state_dict()
    return {**found, "state": {number: gathered(one, keep=keep) for number, one in found["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Take up what ``optimizer_state`` gave, spread as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {number: _spread(parameters[number], one) for number, one in found["state"].items()}
    optimizer.load_state_dict({**found, "state": state})


def _spread(parameter: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state; what has its shape is sharded as it is, a count of steps is not."""
    return {
        name: like(parameter, value) if isinstance(value, torch.Tensor) and value.shape == parameter.shape else value
        for name, value in state.items()
    }
