"""Build batches of packed or padded token sequences; the batches of a step are a pure function of (seed, step).

A batch is a dict:

- ``input_ids``, ``labels``, ``position_ids``: (B, T) int64. Labels are shifted: ``labels[b, t]`` is the token to
  predict at position ``t``, or -100; the last token of a document has no label. Position ids restart at 0 in each
  document. They are 0 in the padding: no position of it may exceed those of the documents (longrope, RoPE scaling).
- ``document_ends``: (documents + 1,) int32, the document boundaries in the flattened batch, from 0 to B * T; the
  padding of a row counts as a document. The last value is repeated so that all packed batches have the same number of
  boundaries.
- ``longest``: int, an upper bound of the document length.
- ``trained_at``: (trained,) int64, the flattened positions that have a label.
- ``packed``: bool, whether a row contains several documents.
- ``tokens``, ``trained``: ints, the number of tokens without padding, and of labels.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.data.packing import IGNORED, Rows, one_by_one
from runner.errors import ConfigError, Fault

Batch = dict[str, Any]

PADDED_TO = 8
"""Padded lengths are multiples of this: faster on tensor cores, and fewer different shapes."""


@dataclass(frozen=True)
class Shape:
    """The size of a batch."""

    rows: int
    length: int
    trained: int
    """Number of labels."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Batches:
    """The batches of a training or an evaluation; those of step ``i`` are a pure function of (seed, i).

    Every epoch has its own order of the packs (without packing: of the rows). A step takes the next
    ``rows_per_batch * accumulation * world`` packs, possibly across the end of an epoch; this rank computes its share.
    With ``epochs``, the stream ends after that many epochs, and the last step may be smaller.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        packing: bool,
        max_length: int,
        rows_per_batch: int,
        accumulation: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        rank: int = 0,
        world: int = 1,
        epochs: float | None = None,
    ) -> None:
        self.rows, self.packs = rows, rows.packs if packing else one_by_one(len(rows))
        self.packing, self.max_length, self.pad_id = packing, max_length, pad_id
        self.rows_per_batch, self.rank, self.world = rows_per_batch, rank, world
        self.per_micro_batch = rows_per_batch * world
        self.per_step = self.per_micro_batch * accumulation
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.sizes = np.add.reduceat(rows.lengths[self.packs.rows], self.packs.offsets[:-1])  # tokens of each pack
        assert packing is False or self.sizes.max() <= max_length, "a pack is longer than max_length"
        self._most_documents = int(np.diff(self.packs.offsets).max(initial=0))
        self.end_to_end = False
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)
        self._tokens_before = functools.lru_cache(maxsize=2)(self._sum_tokens)

    def step(self, i: int) -> list[Batch]:
        """The micro-batches of optimizer step ``i`` (from 0); every rank gets the same number of them."""
        positions = range(i * self.per_step, min((i + 1) * self.per_step, self._end()))
        packs = [int(self._order(p // len(self.packs))[p % len(self.packs)]) for p in positions]
        return list(self._cut(packs))

    def one_pass(self) -> Iterator[Batch]:
        """Every pack once, in the order of the first epoch, for an evaluation."""
        return self._cut(self._order(0).tolist())

    @property
    def batches_in_pass(self) -> int:
        """Number of batches that ``one_pass`` yields."""
        return math.ceil(len(self.packs) / self.per_micro_batch)

    def steps(self, max_steps: int | None = None, epochs: float | None = None, max_tokens: int | None = None) -> int:
        """Number of optimizer steps until the first of these limits is reached.

        Raises:
            ConfigError: all limits are None.
        """
        limits = [max_steps] if max_steps is not None else []
        for limit in (epochs, self.epochs):
            if limit is not None:
                limits.append(math.ceil(self._packs_of(limit) / self.per_step))
        if max_tokens is not None:
            limits.append(math.ceil(self._packs_until(max_tokens) / self.per_step))
        if not limits:
            remedy = "set one of train.max_steps, train.num_train_epochs, train.max_tokens"
            raise ConfigError(Fault("train", "no stopping criterion", remedy))
        return max(1, min(limits))

    def tokens_at(self, step: int) -> int:
        """Tokens without padding in the first ``step`` steps, over all ranks."""
        epoch, packs = divmod(min(step * self.per_step, self._end()), len(self.packs))
        return int(epoch * self.sizes.sum() + self._tokens_before(epoch)[packs])

    def epoch(self, step: int) -> float:
        """Number of epochs, as a fraction, after ``step`` steps."""
        return float(min(step * self.per_step, self._end()) / len(self.packs))

    def laid_end_to_end(self) -> Batches:
        """A copy without padding between rows: unpacked rows are concatenated to one row, (1, sum of lengths)."""
        batches = copy.copy(self)
        batches.end_to_end = not self.packing
        return batches

    def heaviest(self) -> Batch:
        """A batch of this rank with the largest packs, to measure peak memory; belongs to no training step.

        With packing all rows have equal length, so the packs with the most labels are used.
        """
        counts = self._trained if self.packing else self.sizes
        return self._build(np.argsort(counts, kind="stable")[-self.rows_per_batch :].tolist())

    def cut_into(self, rows: int) -> Batches:
        """A copy with the same steps in micro-batches of ``rows`` rows, which must divide a rank's rows of a step."""
        assert self.per_step % (rows * self.world) == 0
        batches = copy.copy(self)
        batches.rows_per_batch, batches.per_micro_batch = rows, rows * self.world
        return batches

    @property
    def largest(self) -> Shape:
        """Upper bound of the size and the number of labels of any batch."""
        longest = int(self._largest_of(self.sizes).max())
        rows = min(self.rows_per_batch, len(self.packs))
        trained = int(self._largest_of(self._trained).sum())
        if self.end_to_end:
            return Shape(1, self._padded(int(self._largest_of(self.sizes).sum())), trained)
        return Shape(self.rows_per_batch if self.packing else rows, self._padded(longest), trained)

    @functools.cached_property
    def _trained(self) -> np.ndarray:
        """Number of labels in each pack."""
        of_rows = np.add.reduceat(self.rows.labels != IGNORED, self.rows.offsets[:-1], dtype=np.int64)
        return np.add.reduceat(of_rows[self.packs.rows], self.packs.offsets[:-1])

    def _largest_of(self, counts: np.ndarray) -> np.ndarray:
        """The ``rows_per_batch`` largest counts: the worst case of one batch."""
        return np.sort(counts)[-self.rows_per_batch :]

    @property
    def efficiency(self) -> float:
        """Fraction of the computed positions that are not padding, in the first epoch."""
        if self.packing:
            return float(self.sizes.sum() / (len(self.packs) * self.max_length))
        parts = np.split(self.sizes[self._order(0)], range(self.rows_per_batch, len(self.packs), self.rows_per_batch))
        if self.end_to_end:
            return float(self.sizes.sum() / sum(self._padded(int(part.sum())) for part in parts))
        return float(self.sizes.sum() / sum(len(part) * self._padded(int(part.max())) for part in parts))

    def _draw_order(self, epoch: int) -> np.ndarray:
        """The order of the packs in one epoch, from PCG64's raw numbers: numpy guarantees that they never change."""
        if not self.shuffle:
            return np.arange(len(self.packs))
        numbers = np.random.PCG64([self.seed % 2**64, epoch]).random_raw(len(self.packs))
        return np.argsort(numbers, kind="stable")

    def _sum_tokens(self, epoch: int) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.sizes[self._order(epoch)])])

    def _packs_of(self, epochs: float) -> int:
        return math.ceil(epochs * len(self.packs) - 1e-6)

    def _packs_until(self, tokens: int) -> int:
        epoch, rest = divmod(tokens, int(self.sizes.sum()))
        return epoch * len(self.packs) + int(np.searchsorted(self._tokens_before(epoch), rest))

    def _end(self) -> int:
        return self._packs_of(self.epochs) if self.epochs is not None else 2**62

    def _cut(self, packs: list[int]) -> Iterator[Batch]:
        for start in range(0, len(packs), self.per_micro_batch):
            yield self._build(packs[start : start + self.per_micro_batch][self.rank :: self.world])

    def _build(self, packs: list[int]) -> Batch:
        """Build one micro-batch of these packs; rows that are missing for the fixed shape contain only padding."""
        import torch

        members = [self.packs.rows[self.packs.offsets[k] : self.packs.offsets[k + 1]] for k in packs]
        if self.end_to_end:
            members = [np.concatenate(members)] if members else []
        # Packed batches keep their shape even at the end of an epoch: a new shape would recompile the model.
        count = self.rows_per_batch if self.packing else max(len(members), 1)
        length = self._padded(max((int(self.rows.lengths[rows].sum()) for rows in members), default=0))
        ids = np.full((count, length), self.pad_id, dtype=np.int64)
        labels = np.full((count, length), IGNORED, dtype=np.int64)
        positions = np.tile(np.arange(length), (count, 1))
        ends = [0]
        for b in range(count):
            start = 0
            for row in members[b] if b < len(members) else ():
                row_ids, row_labels = self.rows[row]
                end = start + len(row_ids)
                ids[b, start:end] = row_ids
                labels[b, start : end - 1] = row_labels[1:]
                positions[b, start:end] -= start
                ends.append(b * length + end)
                start = end
            positions[b, start:] = 0
            ends.append((b + 1) * length)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "document_ends": torch.from_numpy(self._pad_ends(ends)),
            "longest": self.max_length,
            "trained_at": torch.from_numpy(np.flatnonzero(labels != IGNORED)),
            "packed": self.packing or self.end_to_end,
            "tokens": int(self.sizes[packs].sum()) if packs else 0,
            "trained": int((labels != IGNORED).sum()),
        }

    def _pad_ends(self, ends: list[int]) -> np.ndarray:
        """Document ends, (documents + 1,) int32; packed batches repeat the last one up to a fixed number."""
        most = self.rows_per_batch * (self._most_documents + 1) + 1 if self.packing else 0
        return np.array(ends + [ends[-1]] * max(most - len(ends), 0), dtype=np.int32)

    def _padded(self, length: int) -> int:
        """The row length T of a batch whose longest row has ``length`` tokens."""
        if self.packing:
            return self.max_length
        if self.end_to_end:
            return -(-max(length, 1) // PADDED_TO) * PADDED_TO
        return max(length, min(-(-max(length, 1) // PADDED_TO) * PADDED_TO, self.max_length))
