"""What a task may compute without gradients before a step: the KL of KTO, the answers of GRPO.

The result must be a pure function of the weights, the seed and the step, the same for any cut into micro-batches and
ranks. Then a resumed run is bit-identical without saving it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.data.packing import Rows


@dataclass(frozen=True)
class StepContext:
    """The batches of the next step, or of a whole evaluation, and the model in eval mode, without gradients."""

    model: Any
    tokenizer: Any
    batches: Batches
    packs: list[int]
    """Of the step or the evaluation, in its order, over all ranks."""
    micro_batches: list[Batch]
    """The micro-batches of this rank, on the device."""
    seed: int
    """The same on all ranks."""
    trains: bool
    """Whether a training step follows; False: an evaluation."""
    start: Callable[[], AbstractContextManager[Any]]
    """Context that yields the model with the weights before the first step (only with ``Task.needs_start``)."""
    on_device: Callable[[Batch], Batch]
    show: Callable[[list[dict[str, Any]]], None]
    """Keep samples of an evaluation, for people to read."""
    agree: Callable[..., list[float]]
    """Sum numbers over all ranks. Raises Stopped if a stop was requested: call it equally often on all ranks."""

    @property
    def order(self) -> list[int]:
        """All rows of the step in its order."""
        return self.batches.rows_in(self.packs)

    @property
    def rows(self) -> list[list[int]]:
        """The rows of each micro-batch of this rank."""
        return [self.batches.rows_in(packs) for packs in self.batches.parts(self.packs)]

    def batch(
        self, documents: Sequence[Any], max_length: int | None = None, unit: int = 1, **values: Sequence[float]
    ) -> Batch:
        """A batch of new documents, (token ids, labels) each, on the device; ``values``: numbers of each.

        ``unit``: how many of them follow each other that answer the same prompt, which may be computed once for all.
        """
        rows = replace(Rows.of(documents, **values), unit=unit)
        return self.on_device(self.batches.of_documents(rows, max_length or self.batches.max_length))
