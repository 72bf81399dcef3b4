"""Prepare the batches of the next step and copy them to the device while the current step computes."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.train.distributed.wrap import on_device


class Prefetcher:
    """Micro-batches of each optimizer step on the device, prefetched one step ahead."""

    def __init__(self, batches: Batches, device: torch.device, total_steps: int) -> None:
        self.batches, self.device, self.total_steps = batches, device, total_steps
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A new thread begins on GPU 0, and leaving a stream would return to it: a context of 0.5 GiB for each rank.
        enter = functools.partial(torch.cuda.set_device, device) if self._stream else None
        self._pool = ThreadPoolExecutor(1, "batches", enter)
        self._next: tuple[int, Future[Any]] | None = None

    def step(self, i: int) -> list[Batch]:
        """Micro-batches of step ``i`` (from 0); starts step i + 1. Only the device waits for the copy."""
        number, future = self._next or (-1, None)
        batches, arrived = future.result() if future and number == i else self._make(i)
        self._next = (i + 1, self._pool.submit(self._make, i + 1)) if i + 1 < self.total_steps else None
        if arrived is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(arrived)
            for tensor in (value for batch in batches for value in batch.values() if isinstance(value, Tensor)):
                tensor.record_stream(now)  # otherwise the copy stream could reuse its memory
        return list(batches)

    def _make(self, i: int) -> tuple[list[Batch], torch.cuda.Event | None]:
        batches = self.batches.step(i)
        if self._stream is None:
            return batches, None
        with torch.cuda.stream(self._stream):
            copied = [on_device(batch, self.device) for batch in batches]
            return copied, self._stream.record_event()
