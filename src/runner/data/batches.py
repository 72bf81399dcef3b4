"""Build batches of packed or padded token sequences; the batches of a step are a pure function of (seed, step).

A batch is a dict:

- ``input_ids``, ``labels``, ``position_ids``: (B, T) int64. Labels are shifted: ``labels[b, t]`` is the token to
  predict at position ``t``, or -100; the last token of a document has no label. Position ids restart at 0 in each
  document. They are 0 in the padding: no position of it may exceed those of the documents (longrope, RoPE scaling).
- ``document_ends``: (documents + 1,) int32, the document boundaries in the flattened batch, from 0 to B * T; the
  padding of a row counts as documents, and some have length zero.
- ``longest``: int, an upper bound of the document length in all batches.
- ``attention_parts``: the ``boundaries.Part`` that attention by document computes one after the other.
- ``trained_at``: (trained,) int64, the flattened positions that have a label.
- ``last_at``: (documents,) int64, the flattened positions of the last token of each document.
- ``labels_per_document``: (documents,) int64, without padding. Documents of a unit, such as the two answers of a
  preference pair, are neighbours.
- ``packed``: bool, whether a row contains several documents.
- ``tokens``, ``trained``, ``trained_first``, ``documents``, ``units``: ints, the number of tokens without padding, of
  labels, of labels in the first document of each unit, and so on. ``weighted``: the sum of the labels' weights.
- ``weights``: (trained,) float32, the weight of each label in the order of ``trained_at``; only if the data have any.
- The numbers of each document, by name (``Rows.values``): (documents,) float32.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.data import boundaries
from runner.data.examples import Answers
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
    With ``epochs``, the stream ends after that many epochs, and the last step may be smaller. With ``answers``, the
    rows are prompts, and what is computed are documents that a task makes of them: see ``of_documents``.
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
        answers: Answers | None = None,
    ) -> None:
        self.rows, self.packs = rows, rows.packs if packing else one_by_one(len(rows), rows.unit)
        self.packing, self.max_length, self.pad_id = packing, max_length, pad_id
        self.rows_per_batch, self.rank, self.world = rows_per_batch, rank, world
        self.per_micro_batch = rows_per_batch * world
        self.per_step = self.per_micro_batch * accumulation
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.answers = answers
        self.sizes = np.add.reduceat(rows.lengths[self.packs.rows], self.packs.offsets[:-1])  # tokens of each pack
        self.pack_length = rows.unit * max_length
        assert packing is False or self.sizes.max() <= self.pack_length, "a pack is longer than its row"
        self.end_to_end = self.by_document = False
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)
        self._tokens_before = functools.lru_cache(maxsize=2)(self._sum_tokens)

    def step(self, i: int) -> list[Batch]:
        """The micro-batches of optimizer step ``i`` (from 0); every rank gets the same number of them."""
        return list(self._cut(self.packs_of_step(i)))

    def one_pass(self) -> Iterator[Batch]:
        """Every pack once, in the order of the first epoch, for an evaluation."""
        return self._cut(self.packs_of_pass())

    def of(self, packs: list[int]) -> Batch:
        """One batch of these packs, at most ``rows_per_batch``."""
        return self._build(packs)

    def rows_of(self, pack: int) -> np.ndarray:
        """The rows of a pack."""
        return self.packs.rows[self.packs.offsets[pack] : self.packs.offsets[pack + 1]]

    def rows_in(self, packs: list[int]) -> list[int]:
        """The rows of these packs, in their order."""
        return [int(row) for pack in packs for row in self.rows_of(pack)]

    def visited(self, steps: int) -> list[int]:
        """The packs that this rank computes in the first ``steps`` steps, each once."""
        packs = (pack for i in range(steps) for part in self.parts(self.packs_of_step(i)) for pack in part)
        return list(dict.fromkeys(packs))

    @property
    def pass_packs(self) -> list[int]:
        """The packs that this rank computes in ``one_pass``."""
        return [pack for part in self.parts(self.packs_of_pass()) for pack in part]

    def packs_of_pass(self) -> list[int]:
        """The packs of ``one_pass``, over all ranks."""
        return [int(pack) for pack in self._order(0)]

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
        """Tokens without padding in the first ``step`` steps, over all ranks; with ``answers``: at most."""
        count = min(step * self.per_step, self._end())
        epoch, packs = divmod(count, len(self.packs))
        tokens = int(epoch * self.sizes.sum() + self._tokens_before(epoch)[packs])
        return tokens if self.answers is None else self.answers.per_row * (tokens + count * self.answers.most_tokens)

    def epoch(self, step: int) -> float:
        """Number of epochs, as a fraction, after ``step`` steps."""
        return float(min(step * self.per_step, self._end()) / len(self.packs))

    def laid_end_to_end(self) -> Batches:
        """A copy without padding between rows: unpacked rows are concatenated to one row, (1, sum of lengths)."""
        batches = copy.copy(self)
        batches.end_to_end, batches.by_document = not self.packing, True
        return batches

    def of_documents(self, rows: Rows, max_length: int) -> Batch:
        """One batch of documents that belong to no pack, such as generated ones; ``max_length``: their upper bound."""
        others = Batches(rows, packing=False, max_length=max_length, rows_per_batch=max(len(rows), 1), accumulation=1,
                         seed=self.seed, shuffle=False, pad_id=self.pad_id)  # fmt: skip
        return (others.laid_end_to_end() if self.by_document else others).of(list(range(len(rows))))

    def heaviest(self) -> Batch:
        """A batch of this rank with the largest packs, to measure peak memory; belongs to no training step.

        With packing all rows have equal length, so the packs with the most labels are used.
        """
        if self.answers is not None:
            return self._heaviest_answers()
        counts = self._trained if self.packing else self.sizes
        return self._build(np.argsort(counts, kind="stable")[-self.rows_per_batch :].tolist())

    def _heaviest_answers(self) -> Batch:
        """The longest prompts, each with as many and as long answers as possible."""
        assert self.answers is not None
        longest = np.argsort(self.sizes, kind="stable")[-self.rows_per_batch :].tolist()
        filler = np.full(self.answers.most_tokens, self.pad_id, dtype=np.int32)
        prompts = [self.rows[row][0] for row in longest for _ in range(self.answers.per_row)]
        documents = [
            (np.concatenate([ids, filler]), np.concatenate([np.full_like(ids, IGNORED), filler])) for ids in prompts
        ]
        return self.of_documents(Rows.of(documents), self.longest_document)

    @property
    def longest_document(self) -> int:
        """Upper bound of the tokens of a document."""
        return self.max_length + (self.answers.most_tokens if self.answers is not None else 0)

    def cut_into(self, rows: int) -> Batches:
        """A copy with the same steps in micro-batches of ``rows`` rows, which must divide a rank's rows of a step."""
        assert self.per_step % (rows * self.world) == 0
        batches = copy.copy(self)
        batches.rows_per_batch, batches.per_micro_batch = rows, rows * self.world
        return batches

    @property
    def largest(self) -> Shape:
        """Upper bound of the size and the number of labels of any batch."""
        rows = min(self.rows_per_batch, len(self.packs)) * self.rows.unit
        trained = int(self._largest_of(self._trained).sum())
        if self.answers is not None:
            count, more = rows * self.answers.per_row, self.answers.most_tokens
            lengths, trained = self._largest_of(self.sizes) + more, count * more
            if self.by_document:
                return Shape(1, int(lengths.sum()) * self.answers.per_row, trained)
            return Shape(count, int(lengths.max()), trained)
        if self.end_to_end:
            return Shape(1, self._padded(int(self._largest_of(self.sizes).sum())), trained)
        return Shape(self.rows_per_batch if self.packing else rows, self._padded(int(self._longest.max())), trained)

    @functools.cached_property
    def _trained(self) -> np.ndarray:
        """Number of labels in each pack."""
        return np.add.reduceat(self._labels_of_rows[self.packs.rows], self.packs.offsets[:-1])

    @functools.cached_property
    def _labels_of_rows(self) -> np.ndarray:
        """Number of labels of each row, without that of its first token, which nothing predicts."""
        of_rows = np.add.reduceat(self.rows.labels != IGNORED, self.rows.offsets[:-1], dtype=np.int64)
        return of_rows - (self.rows.labels[self.rows.offsets[:-1]] != IGNORED)

    @functools.cached_property
    def _longest(self) -> np.ndarray:
        """Tokens of the longest row of each pack."""
        return np.maximum.reduceat(self.rows.lengths[self.packs.rows], self.packs.offsets[:-1])

    def _largest_of(self, counts: np.ndarray) -> np.ndarray:
        """The ``rows_per_batch`` largest counts: the worst case of one batch."""
        return np.sort(counts)[-self.rows_per_batch :]

    @property
    def efficiency(self) -> float:
        """Fraction of the computed positions that are not padding, in the first epoch."""
        if self.packing:
            return float(self.sizes.sum() / (len(self.packs) * self.pack_length))
        parts = np.split(self._order(0), range(self.rows_per_batch, len(self.packs), self.rows_per_batch))
        if self.end_to_end:
            return float(self.sizes.sum() / sum(self._padded(int(self.sizes[part].sum())) for part in parts))
        computed = sum(len(part) * self.rows.unit * self._padded(int(self._longest[part].max())) for part in parts)
        return float(self.sizes.sum() / computed)

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

    def packs_of_step(self, i: int) -> list[int]:
        """The packs of optimizer step ``i``, over all ranks."""
        positions = range(i * self.per_step, min((i + 1) * self.per_step, self._end()))
        return [int(self._order(p // len(self.packs))[p % len(self.packs)]) for p in positions]

    def parts(self, packs: list[int]) -> Iterator[list[int]]:
        """This rank's packs of each micro-batch."""
        for start in range(0, len(packs), self.per_micro_batch):
            yield packs[start : start + self.per_micro_batch][self.rank :: self.world]

    def _cut(self, packs: list[int]) -> Iterator[Batch]:
        return map(self._build, self.parts(packs))

    def _build(self, packs: list[int]) -> Batch:
        """Build one micro-batch of these packs; rows that are missing for the fixed shape contain only padding."""
        import torch

        members = [self.rows_of(pack) for pack in packs]
        rows = np.concatenate(members) if members else np.array([], dtype=np.int64)
        if self.end_to_end:
            members = [rows] if members else []
        elif not self.packing:
            members = [np.array([row]) for row in rows]
        # Packed batches keep their shape even at the end of an epoch: a new shape would recompile the model.
        count = self.rows_per_batch if self.packing else max(len(members), 1)
        length = self._padded(max((int(self.rows.lengths[rows].sum()) for rows in members), default=0))
        ids = np.full((count, length), self.pad_id, dtype=np.int64)
        labels = np.full((count, length), IGNORED, dtype=np.int64)
        positions = np.tile(np.arange(length), (count, 1))
        weights = None if self.rows.weights is None else np.zeros((count, length), dtype=np.float32)
        lengths: list[list[int]] = []
        last: list[int] = []
        for b in range(count):
            start = 0
            lengths.append([])
            for row in members[b] if b < len(members) else ():
                row_ids, row_labels = self.rows[row]
                end = start + len(row_ids)
                ids[b, start:end] = row_ids
                labels[b, start : end - 1] = row_labels[1:]
                if weights is not None:
                    weights[b, start : end - 1] = self.rows.weights_of(row)[1:]
                positions[b, start:end] -= start
                lengths[b].append(len(row_ids))
                last.append(b * length + end - 1)
                start = end
            positions[b, start:] = 0
        trained_at = np.flatnonzero(labels != IGNORED)
        ends, parts = (
            boundaries.of_row(lengths[0], length, self.max_length)
            if self.end_to_end
            else boundaries.of_packs(lengths, length, self.max_length)
        )
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "document_ends": torch.from_numpy(ends),
            "attention_parts": parts,
            "longest": self.max_length,
            "trained_at": torch.from_numpy(trained_at),
            "last_at": torch.tensor(last, dtype=torch.int64),
            "labels_per_document": torch.from_numpy(self._labels_of_rows[rows]),
            "packed": self.packing or self.end_to_end,
            "tokens": int(self.sizes[packs].sum()) if packs else 0,
            "trained": len(trained_at),
            **_weighed(weights, trained_at),
            "documents": len(rows),
            "units": len(rows) // self.rows.unit,
            "trained_first": int(self._labels_of_rows[rows[:: self.rows.unit]].sum()),
            **{name: torch.from_numpy(numbers[rows]) for name, numbers in self.rows.values.items()},
        }

    def _padded(self, length: int) -> int:
        """The row length T of a batch whose longest row has ``length`` tokens."""
        if self.packing:
            return self.pack_length
        if self.end_to_end:
            return -(-max(length, 1) // PADDED_TO) * PADDED_TO
        return max(length, min(-(-max(length, 1) // PADDED_TO) * PADDED_TO, self.max_length))


def _weighed(weights: np.ndarray | None, trained_at: np.ndarray) -> Batch:
    """``weighted`` and, if the data have weights, ``weights`` of a batch."""
    import torch

    if weights is None:
        return {"weighted": len(trained_at)}
    weights = weights.reshape(-1)[trained_at]
    return {"weighted": float(weights.sum(dtype=np.float64)), "weights": torch.from_numpy(weights)}
