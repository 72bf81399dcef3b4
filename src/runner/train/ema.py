"""Exponential moving average (EMA) of the trained weights: with ``train.ema`` it is evaluated, and it is the result.

After each step, average ← d * average + (1 - d) * weights, in float32. d is min(decay, (1 + step) / (10 + step)): it
grows to ``decay``, so that short runs forget their start, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from runner.train.distributed import wrap


@dataclass(frozen=True)
class Average:
    """The averages of the trained weights of a model, by name; nothing without ``train.ema``."""

    model: nn.Module = field(default_factory=nn.Module)
    decay: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, decay: float | None) -> Average:
        """Begin with the weights that the model has now."""
        if decay is None:
            return cls(model)
        return cls(model, decay, {name: p.detach().clone().float() for name, p in _trained(model).items()})

    def update(self, step: int) -> None:
        """Add the weights after ``step`` steps, counted from 1."""
        if self.weights:
            current = [parameter.detach().float() for parameter in _trained(self.model).values()]
            add = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            add(list(self.weights.values()), current, step)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        trained = {name: parameter.detach().clone() for name, parameter in self._sharded().items()}
        self.give()
        try:
            yield
        finally:
            _copy(trained, self._sharded())

    def give(self) -> None:
        """Give the model the averaged weights."""
        _copy(self.weights, self._sharded())

    def _sharded(self) -> dict[str, nn.Parameter]:
        """The trained parameters that have averages."""
        if not self.weights:
            return {}
        wrap.reshard(self.model)
        return _trained(self.model)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _copy(values: dict[str, Tensor], into: dict[str, nn.Parameter]) -> None:
    for name, parameter in into.items():
        parameter.copy_(values[name])
