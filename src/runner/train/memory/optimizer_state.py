"""Measure the memory of an optimizer's state before any weights are loaded."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from runner.errors import ConfigError, Fault, RunnerError, typed_line

Groups = list[dict[str, Any]]
VALUES = 2**18
"""The state of a larger parameter is not measured but extrapolated."""


def state_bytes(
    option: Callable[[Groups], Optimizer],
    groups: Groups,
    device: torch.device,
    dtype: torch.dtype,
    values_of: Callable[[torch.Size, str], int] | None = None,
) -> int:
    """Bytes of optimizer state for these parameters, measured with one step on one parameter of each shape.

    ``values_of``: (shape, kind) → numbers in the state of a parameter, of an optimizer that is not measured.

    A parameter with more than ``VALUES`` values is extrapolated from two with fewer rows: of every optimizer here, the
    bytes grow linearly with the rows.

    Raises:
        ConfigError: the optimizer refuses these parameters, or cannot make a step on this device.
    """
    if values_of is not None:
        option(groups)  # refuses what it cannot train
        values = (values_of(p.shape, group["kind"]) for group in groups for p in group["params"])
        return sum(values) * dtype.itemsize
    counts = [Counter(parameter.shape for parameter in group["params"]) for group in groups]
    samples = [{shape: [_parameter(size, device, dtype) for size in _sizes(shape)] for shape in of} for of in counts]
    flat = [list(itertools.chain.from_iterable(sample.values())) for sample in samples]
    optimizer = _after_a_step(option, [{**group, "params": of} for group, of in zip(groups, flat, strict=True)], device)

    def of_shape(shape: torch.Size, parameters: list[Tensor]) -> float:
        first, *larger = [sum(t.nbytes for t in _tensors(optimizer.state.get(p, {}))) for p in parameters]
        more = shape[0] / len(parameters[0]) - 1 if larger else 0.0  # the second sample has twice the rows of the first
        return first + more * (larger[0] - first) if larger else first

    pairs = list(zip(counts, samples, strict=True))
    return int(sum(of[shape] * of_shape(shape, sample[shape]) for of, sample in pairs for shape in of))


def _parameter(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    parameter = torch.nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _after_a_step(option: Callable[[Groups], Optimizer], groups: Groups, device: torch.device) -> Optimizer:
    try:
        optimizer = option(groups)
        optimizer.step()
    except RunnerError:
        raise
    except Exception as error:
        problem = f"cannot make a step on {device.type}: {typed_line(error)}"
        raise ConfigError(Fault("optim", problem, "use optim=adamw")) from error
    return optimizer


def _sizes(shape: torch.Size) -> list[tuple[int, ...]]:
    """The shape itself, or two with n and 2 n rows for a large one."""
    if shape.numel() <= VALUES:
        return [shape]
    rows = max(VALUES * shape[0] // shape.numel() // 2, 1)
    return [(rows, *shape[1:]), (2 * rows, *shape[1:])]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)
