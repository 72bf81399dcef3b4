"""What a device has computed, on its way to Python: read some steps later, so that no step waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

LAG = 2
"""Steps that Python may be ahead of a device that computes by itself."""

About = TypeVar("About")


class AsyncMetrics(Generic[About]):
    """Numbers in the order in which they were computed, each with what it is about.

    Which are due depends on their number alone, not on how fast the device is: all ranks read the same at a time.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[About, Tensor, Any]] = deque()

    @classmethod
    def of(cls, device: torch.device) -> AsyncMetrics[About]:
        """A CPU has computed when its call returns; nothing is gained by waiting."""
        return cls(LAG if device.type == "cuda" else 0)

    def put(self, about: About, numbers: Tensor) -> None:
        """Start the way of ``numbers`` (n,) from the device; does not wait for them."""
        arrived = None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((about, numbers, arrived))

    def due(self, *, all_of_them: bool = False) -> Iterator[tuple[About, list[float]]]:
        """Those that ``lag`` others have followed, or all; waits for the device where it is not so far yet."""
        while len(self._waiting) > (0 if all_of_them else self.lag):
            about, numbers, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield about, numbers.tolist()
