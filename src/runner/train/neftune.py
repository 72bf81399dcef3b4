"""NEFTune (https://arxiv.org/abs/2310.05914): in training, uniform noise is added to the embeddings.

To the d numbers of each token of a document of L tokens is added U(-1, 1) * alpha / sqrt(L * d), also where several
documents share a row. The noise of a document is a pure function of (seed, step, its number in the data): it is the
same for any cut into micro-batches, any number of processes, with and without packing, and in a resumed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from runner.data.collator import Batch
from runner.tasks.task import Task


def noisy(task: Task, model: Any, alpha: float | None, seed: int) -> Task:
    """The task with noise on the embeddings of training batches; those of an evaluation name no step, and have none."""
    if alpha is None:
        return task
    noise = _Noise(alpha, seed)
    model.get_input_embeddings().register_forward_hook(noise)

    def loss(model: Any, batch: Batch) -> dict[str, Tensor]:
        with noise.on(batch):
            return task.loss(model, batch)

    return replace(task, loss=loss)


class _Noise:
    """A forward hook of the embeddings; it does nothing outside ``on``."""

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._batch: Batch = {}

    @contextlib.contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        self._batch = batch
        try:
            yield
        finally:
            self._batch = {}

    def __call__(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """The output (B, T, d) of the embeddings, with noise."""
        step = self._batch.get("step")
        if step is None:
            return output
        width = output.shape[-1]
        noise = torch.zeros_like(output).view(-1, width)
        for row, first, end in self._batch["spans"].tolist():
            generator = torch.Generator(output.device).manual_seed(_seed(self.seed, step, row))
            bound = self.alpha / math.sqrt((end - first) * width)
            noise[first:end].uniform_(-bound, bound, generator=generator)
        return output + noise.view_as(output)


def _seed(seed: int, step: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"neftune/{seed}/{step}/{row}".encode()).digest()[:8], "big") >> 1
