"""Batches of packed or padded token sequences: those of a step are a pure function of (seed, step)."""

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
"""Padded rows are a multiple of this long: tensor cores want it, and fewer shapes occur."""


@dataclass(frozen=True)
class Shape:
    """The size of a batch."""

    rows: int
    length: int
    trained: int
    """Positions with a label."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Batches:
    """The batches of a training or an evaluation; those of step ``i`` are a pure function of (seed, i).

    The packs (rows, where nothing is packed) of one epoch follow those of the last, each in an order of its own. A
    step takes ``rows_per_batch * accumulation * world`` of them, and this rank its share. ``epochs`` ends the stream:
    the last step is then shortened rather than running into the next epoch.
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
        self.sizes = np.add.reduceat(rows.lengths[self.packs.rows], self.packs.offsets[:-1])  # useful tokens of each
        assert packing is False or self.sizes.max() <= max_length, "the packs are larger than the rows of a batch"
        self._most_documents = int(np.diff(self.packs.offsets).max(initial=0))
        self.end_to_end = False
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)
        self._tokens_before = functools.lru_cache(maxsize=2)(self._sum_tokens)

    def step(self, i: int) -> list[Batch]:
        """The micro-batches of optimizer step ``i``, counted from 0; the same number on every rank."""
        positions = range(i * self.per_step, min((i + 1) * self.per_step, self._end()))
        packs = [int(self._order(at // len(self.packs))[at % len(self.packs)]) for at in positions]
        return list(self._cut(packs))

    def one_pass(self) -> Iterator[Batch]:
        """Every pack once, in the order of the first epoch: an evaluation."""
        return self._cut(self._order(0).tolist())

    @property
    def batches_in_pass(self) -> int:
        """How many batches ``one_pass`` yields."""
        return math.ceil(len(self.packs) / self.per_micro_batch)

    def steps(self, max_steps: int | None = None, epochs: float | None = None, max_tokens: int | None = None) -> int:
        """Optimizer steps until the first of these limits is reached.

        Raises:
            ConfigError: there is no limit.
        """
        limits = [max_steps] if max_steps is not None else []
        for limit in (epochs, self.epochs):
            if limit is not None:
                limits.append(math.ceil(self._packs_of(limit) / self.per_step))
        if max_tokens is not None:
            limits.append(math.ceil(self._packs_until(max_tokens) / self.per_step))
        if not limits:
            remedy = "set one of train.max_steps, train.num_train_epochs, train.max_tokens"
            raise ConfigError(Fault("train", "nothing says when training ends", remedy))
        return max(1, min(limits))

    def tokens_at(self, step: int) -> int:
        """Useful tokens of the first ``step`` steps, over all ranks."""
        epoch, packs = divmod(min(step * self.per_step, self._end()), len(self.packs))
        return int(epoch * self.sizes.sum() + self._tokens_before(epoch)[packs])

    def epoch(self, step: int) -> float:
        """How many times the data has been gone through after ``step`` steps."""
        return float(min(step * self.per_step, self._end()) / len(self.packs))

    def laid_end_to_end(self) -> Batches:
        """The same batches without padding: rows that are not packed follow each other in one, (1, sum of lengths)."""
        laid = copy.copy(self)
        laid.end_to_end = not self.packing
        return laid

    def heaviest(self) -> Batch:
        """The batch that the largest packs would make; packed ones are equally long, and those with most labels count.

        Of this rank alone, and of no step.
        """
        counts = self._trained if self.packing else self.sizes
        return self._build(np.argsort(counts, kind="stable")[-self.rows_per_batch :].tolist())

    def cut_into(self, rows: int) -> Batches:
        """The same steps, computed so many rows at a time on each rank; they must divide what it has in a step."""
        assert self.per_step % (rows * self.world) == 0
        cut = copy.copy(self)
        cut.rows_per_batch, cut.per_micro_batch = rows, rows * self.world
        return cut

    @property
    def largest(self) -> Shape:
        """No batch is larger, and none has more trained positions."""
        longest = int(self._largest_of(self.sizes).max())
        rows = min(self.rows_per_batch, len(self.packs))
        trained = int(self._largest_of(self._trained).sum())
        if self.end_to_end:
            return Shape(1, self._padded(int(self._largest_of(self.sizes).sum())), trained)
        return Shape(self.rows_per_batch if self.packing else rows, self._padded(longest), trained)

    @functools.cached_property
    def _trained(self) -> np.ndarray:
        """Trained positions of each pack."""
        of_rows = np.add.reduceat(self.rows.labels != IGNORED, self.rows.offsets[:-1], dtype=np.int64)
        return np.add.reduceat(of_rows[self.packs.rows], self.packs.offsets[:-1])

    def _largest_of(self, counts: np.ndarray) -> np.ndarray:
        """The largest counts that can meet in one batch."""
        return np.sort(counts)[-self.rows_per_batch :]

    @property
    def efficiency(self) -> float:
        """Useful tokens for each slot computed, over the first epoch."""
        if self.packing:
            return float(self.sizes.sum() / (len(self.packs) * self.max_length))
        parts = np.split(self.sizes[self._order(0)], range(self.rows_per_batch, len(self.packs), self.rows_per_batch))
        if self.end_to_end:
            return float(self.sizes.sum() / sum(self._padded(int(part.sum())) for part in parts))
        return float(self.sizes.sum() / sum(len(part) * self._padded(int(part.max())) for part in parts))

    def _draw_order(self, epoch: int) -> np.ndarray:
        """The order of the packs in one epoch; from a generator whose raw numbers numpy promises never to change."""
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
        for at in range(0, len(packs), self.per_micro_batch):
            yield self._build(packs[at : at + self.per_micro_batch][self.rank :: self.world])

    def _build(self, packs: list[int]) -> Batch:
        """One micro-batch: the packs given, and rows of nothing but padding where the shape asks for more."""
        import torch

        members = [self.packs.rows[self.packs.offsets[k] : self.packs.offsets[k + 1]] for k in packs]
        if self.end_to_end:
            members = [np.concatenate(members)] if members else []
        # Packed batches keep one shape even at the end of an epoch: a new one would compile the model anew.
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
            if self.packing or self.end_to_end:
                positions[b, start:] -= start
            ends.append((b + 1) * length)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "document_ends": torch.from_numpy(self._fixed(ends)),
            "longest": self.max_length,
            "trained_at": torch.from_numpy(np.flatnonzero(labels != IGNORED)),
            "packed": self.packing or self.end_to_end,
            "tokens": int(self.sizes[packs].sum()) if packs else 0,
            "trained": int((labels != IGNORED).sum()),
        }

    def _fixed(self, ends: list[int]) -> np.ndarray:
        """The ends of the documents, as many in each packed batch; (documents + 1,) int32."""
        most = self.rows_per_batch * (self._most_documents + 1) + 1 if self.packing else 0
        return np.array(ends + [ends[-1]] * max(most - len(ends), 0), dtype=np.int32)

    def _padded(self, length: int) -> int:
        """How long the rows of a batch are whose longest has this many tokens."""
        if self.packing:
            return self.max_length
        if self.end_to_end:
            return -(-max(length, 1) // PADDED_TO) * PADDED_TO
        return max(length, min(-(-max(length, 1) // PADDED_TO) * PADDED_TO, self.max_length))
