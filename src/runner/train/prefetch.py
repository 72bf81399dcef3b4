"""The batches of the next step: made, and on their way to the device, while this one computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from runner.data.batches import Batch, Batches


class Prefetcher:
    """Micro-batches by optimizer step, on the device, one step ahead of who asks for them."""

    def __init__(self, batches: Batches, device: torch.device, total_steps: int) -> None:
        self.batches, self.device, self.total_steps = batches, device, total_steps
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[Any]] | None = None

    def step(self, i: int) -> list[Batch]:
        """Those of step ``i``, counted from 0; the next is begun. The device waits for the copy, Python does not."""
        number, made = self._next or (-1, None)
        batches, arrived = made.result() if made and number == i else self._make(i)
        self._next = (i + 1, self._pool.submit(self._make, i + 1)) if i + 1 < self.total_steps else None
        if arrived is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(arrived)
            for tensor in (value for batch in batches for value in batch.values() if isinstance(value, Tensor)):
                tensor.record_stream(now)  # or its memory would be used again by the other stream
        return list(batches)

    def _make(self, i: int) -> tuple[list[Batch], torch.cuda.Event | None]:
        batches = self.batches.step(i)
        if self._stream is None:
            return batches, None
        with torch.cuda.stream(self._stream):
            copied = [{name: self._copied(value) for name, value in batch.items()} for batch in batches]
            return copied, self._stream.record_event()

    def _copied(self, value: Any) -> Any:
        """From pinned memory: from any other the copy would wait for what the device computes."""
        return value.pin_memory().to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
