"""Copy metrics from the GPU asynchronously: they are read some steps later, so that no step waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

LAG = 2
"""Number of steps between a step on a GPU and reading its metrics."""

About = TypeVar("About")


class AsyncMetrics(Generic[About]):
    """Queue of metric tensors, each with a label (``about``), in the order in which they were computed.

    Entries are due by count, not by time, so that all ranks read the same entries at the same step.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[About, Tensor, Any]] = deque()

    @classmethod
    def of(cls, device: torch.device) -> AsyncMetrics[About]:
        """A queue with ``LAG`` on CUDA and no lag on the CPU, where operations are synchronous."""
        return cls(LAG if device.type == "cuda" else 0)

    def put(self, about: About, numbers: Tensor) -> None:
        """Start an asynchronous copy of ``numbers`` (n,) to the CPU."""
        arrived = None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((about, numbers, arrived))

    def due(self, *, everything: bool = False) -> Iterator[tuple[About, list[float]]]:
        """Yield entries that are followed by at least ``lag`` others, or all; waits for unfinished copies."""
        while len(self._waiting) > (0 if everything else self.lag):
            about, numbers, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield about, numbers.tolist()
