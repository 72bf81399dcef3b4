"""Averages of the trained weights, which are evaluated and are the result.

- ``train.ema``: after each step, average ← d * average + (1 - d) * weights, in float32. d is
  min(decay, (1 + step) / (10 + step)): it grows to ``decay``, so that short runs forget their start, too.
- ``train.swa_start``, stochastic weight averaging (https://arxiv.org/abs/1803.05407): the mean of the weights after
  each of the last steps, in float32. Before them, the average is the weights.
- ``optim=schedule_free``: optimizers of schedulefree compute an average of their own from their state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from runner.train.distributed import wrap


@dataclass(frozen=True)
class Average:
    """The averages of the trained weights of a model; the default is none."""

    model: nn.Module = field(default_factory=nn.Module)
    name: str = ""
    """The option that averages, such as ``train.ema=0.999``; empty if none does."""
    decay: Callable[[int], float] = lambda _: 0.0
    """Step, counted from 1 → the share of the former average in the new one."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The averages that are updated after each step, by name."""
    optimizer: Any = None
    """An optimizer that averages: its ``eval`` gives the model the averages."""

    @classmethod
    def of(
        cls, model: nn.Module, name: str, decay: Callable[[int], float] | None, optimizer: torch.optim.Optimizer
    ) -> Average:
        """Begin with the weights that the model has now."""
        if decay is not None:
            return cls(model, name, decay, {name: p.detach().clone().float() for name, p in _trained(model).items()})
        return cls(model, name, optimizer=optimizer if hasattr(optimizer, "eval") else None)

    @property
    def is_kept(self) -> bool:
        """Whether there are averages."""
        return bool(self.weights) or self.optimizer is not None

    def update(self, step: int) -> None:
        """Add the weights after ``step`` steps, counted from 1."""
        if self.weights:
            current = [parameter.detach().float() for parameter in _trained(self.model).values()]
            add = get_ema_multi_avg_fn(self.decay(step))
            add(list(self.weights.values()), current, step)

    def values(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint."""
        if self.optimizer is None:
            return self.weights
        with self.in_model():
            return {name: parameter.detach().clone() for name, parameter in self._sharded().items()}

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights; after it, bit for bit those of before."""
        trained = {name: parameter.detach().clone() for name, parameter in self._sharded().items()}
        self.give()
        try:
            yield
        finally:
            if self.optimizer is not None:
                self.optimizer.train()  # computes the weights back, rounded: they are replaced by the exact ones
            _copy(trained, self._sharded())

    def give(self) -> None:
        """Give the model the averaged weights."""
        if self.optimizer is not None:
            self.optimizer.eval()
        else:
            _copy(self.weights, self._sharded())

    def _sharded(self) -> dict[str, nn.Parameter]:
        """The trained parameters that have averages."""
        if not self.is_kept:
            return {}
        wrap.reshard(self.model)
        return _trained(self.model)


def decay_of(ema: float | None, swa_start: float | None, steps: int) -> Callable[[int], float] | None:
    """``Average.decay`` for ``train.ema`` or ``train.swa_start`` in a run of so many steps; None without either."""
    if ema is not None:
        return lambda step: min(ema, (1 + step) / (10 + step))
    if swa_start is None:
        return None
    before = int(swa_start * steps)
    return lambda step: 1 - 1 / max(step - before, 1)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _copy(values: dict[str, Tensor], into: dict[str, nn.Parameter]) -> None:
    for name, parameter in into.items():
        parameter.copy_(values[name])
