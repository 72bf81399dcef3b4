"""The batches of packed or padded token sequences that a rank computes."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runner.data import images
from runner.data.collator import Batch, collate
from runner.data.data_order import DataOrder
from runner.data.examples import Answers
from runner.data.packing import IGNORED, Rows, SourcePart
from runner.data.shared_prompts import shared_lengths
from runner.data.vision import Vision

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

    A step takes ``rows_per_batch * accumulation * world`` packs (without packing: rows) in the ``order`` of the data;
    this rank computes its share. With ``epochs``, the data end after that many epochs. With ``answers``, the rows are
    prompts, and a task makes of them the documents that are computed: see ``of_documents``.
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
        max_repeats: float = math.inf,
        vision: Vision | None = None,
    ) -> None:
        self.rows, self.packs = rows, rows.packs if packing else rows.packs.apart(rows.unit)
        self.packing, self.max_length, self.pad_id = packing, max_length, pad_id
        self.rows_per_batch, self.rank, self.world = rows_per_batch, rank, world
        self.per_micro_batch = rows_per_batch * world
        self.answers, self.vision = answers, vision
        self.sizes = self.packs.numbers(rows.lengths_of)  # tokens of each pack
        self.pack_length = rows.unit * max_length
        assert packing is False or self.sizes.max() <= self.pack_length, "a pack is longer than its row"
        per_step = self.per_micro_batch * accumulation
        places = None if rows.places is None or not shuffle else rows.places[self.packs.rows[self.packs.offsets[:-1]]]
        self.order = DataOrder(self.sizes, per_step=per_step, seed=seed, shuffle=shuffle, epochs=epochs,
                               max_repeats=max_repeats, places=places, **self._of_parts())  # fmt: skip
        self._part: int | None = None
        self.end_to_end = self.by_document = self.shares_prompts = False
        self.shared: np.ndarray | None = None

    def step(self, i: int) -> list[Batch]:
        """The micro-batches of optimizer step ``i`` (from 0); every rank gets the same number of them."""
        return [{**self.of(packs), "step": i} for packs in self.parts(self.order.packs_of_step(i))]

    def one_pass(self) -> Iterator[Batch]:
        """Every pack once, in the order of the first epoch, for an evaluation."""
        return map(self.of, self.parts(self.packs_of_pass()))

    def packs_of_pass(self) -> list[int]:
        """The packs of ``one_pass``, over all ranks."""
        return self.order.packs_of_pass(self._part)

    def by_part(self) -> list[tuple[SourcePart, Batches]]:
        """Each part of the rows, with batches whose ``one_pass`` has the packs of that part alone."""
        if not self.rows.parts:
            return [(SourcePart("", len(self.rows)), self)]
        return [(part, self._only(number)) for number, part in enumerate(self.rows.parts)]

    def _only(self, part: int) -> Batches:
        batches = copy.copy(self)
        batches._part = part
        return batches

    def _of_parts(self) -> dict[str, Any]:
        """Arguments of ``DataOrder`` for several sources; empty for one."""
        if len(self.rows.parts) < 2:
            return {}
        owners = self.rows.owners(self.packs.rows[self.packs.offsets[:-1]])
        counted = self._trained if self._trained.any() else np.diff(self.packs.offsets)
        return {"parts": self.rows.parts, "owners": owners, "counted": counted}

    def of(self, packs: list[int]) -> Batch:
        """One batch of these packs, at most ``rows_per_batch``."""
        members = [self.rows_of(pack) for pack in packs]
        rows = np.concatenate(members) if members else np.array([], dtype=np.int64)
        if self.end_to_end:
            members = [rows] if members else []
        elif not self.packing:
            members = [np.array([row]) for row in rows]
        # Packed batches keep their shape even at the end of an epoch: a new shape would recompile the model.
        count = self.rows_per_batch if self.packing and not self.end_to_end else max(len(members), 1)
        length = self._padded(max((int(self._computed_lengths(rows).sum()) for rows in members), default=0))
        batch = collate(self.rows, members, shape=(count, length), longest=self.max_length, pad_id=self.pad_id,
                        end_to_end=self.end_to_end, shared=self.shared)  # fmt: skip
        if self.vision is not None:
            listed = [[each for row in rows for each in images.of_rows(self.rows.images, row)] for rows in members]
            batch |= self.vision.tensors(listed, batch["input_ids"])
        return {**batch, "packed": self.packing or self.end_to_end}

    def rows_of(self, pack: int) -> np.ndarray:
        """The rows of a pack, int64."""
        return self.packs.rows[self.packs.offsets[pack] : self.packs.offsets[pack + 1]].astype(np.int64)

    def rows_in(self, packs: list[int]) -> list[int]:
        """The rows of these packs, in their order."""
        return [int(row) for pack in packs for row in self.rows_of(pack)]

    def visited(self, steps: int) -> list[int]:
        """The packs that this rank computes in the first ``steps`` steps, each once."""
        packs = (pack for i in range(steps) for part in self.parts(self.order.packs_of_step(i)) for pack in part)
        return list(dict.fromkeys(packs))

    @property
    def pass_packs(self) -> list[int]:
        """The packs that this rank computes in ``one_pass``."""
        return [pack for part in self.parts(self.packs_of_pass()) for pack in part]

    @property
    def batches_in_pass(self) -> int:
        """Number of batches that ``one_pass`` yields."""
        return math.ceil(len(self.packs_of_pass()) / self.per_micro_batch)

    def parts(self, packs: list[int]) -> Iterator[list[int]]:
        """This rank's packs of each micro-batch; ``packs``: those of all ranks."""
        for start in range(0, len(packs), self.per_micro_batch):
            yield packs[start : start + self.per_micro_batch][self.rank :: self.world]

    def tokens_at(self, step: int) -> int:
        """Tokens without padding in the first ``step`` steps, over all ranks; with ``answers``: at most."""
        tokens = self.order.tokens_before(step)
        if self.answers is None:
            return tokens
        return self.answers.per_row * (tokens + self.order.packs_before(step) * self.answers.most_tokens)

    def laid_end_to_end(self) -> Batches:
        """A copy without padding between rows: unpacked rows are concatenated to one row, (1, sum of lengths)."""
        batches = copy.copy(self)
        batches.end_to_end, batches.by_document = not self.packing, True
        return batches

    def sharing_prompts(self) -> Batches:
        """A copy laid end to end in which the sequences of a unit share their first tokens, see ``shared_prompts``.

        So do the answers to a prompt. Packs are laid end to end, too: with fewer tokens they would not fill their rows.
        """
        batches = copy.copy(self)
        batches.end_to_end = batches.by_document = batches.shares_prompts = True
        batches.shared = shared_lengths(self.rows) if self.rows.unit > 1 else None
        return batches

    def of_documents(self, rows: Rows, max_length: int) -> Batch:
        """One batch of documents that belong to no pack, such as generated ones; ``max_length``: their upper bound."""
        others = Batches(rows, packing=False, max_length=max_length, rows_per_batch=max(len(rows), 1), accumulation=1,
                         seed=0, shuffle=False, pad_id=self.pad_id)  # fmt: skip
        if self.by_document:
            others = others.sharing_prompts() if self.shares_prompts else others.laid_end_to_end()
        return others.of(list(range(len(others.packs))))

    def cut_into(self, rows: int) -> Batches:
        """A copy with the same steps in micro-batches of ``rows`` rows, which must divide a rank's rows of a step."""
        assert self.order.per_step % (rows * self.world) == 0
        batches = copy.copy(self)
        batches.rows_per_batch, batches.per_micro_batch = rows, rows * self.world
        return batches

    def heaviest(self) -> Batch:
        """A batch of this rank with the largest packs, to measure peak memory; belongs to no training step.

        With packing all rows have equal length, so the packs with the most labels are used.
        """
        if self.answers is not None:
            return self._heaviest_answers()
        counts = self._trained if self.packing and not self.end_to_end else self._computed_sizes
        return self.of(np.argsort(counts, kind="stable")[-self.rows_per_batch :].tolist())

    def _heaviest_answers(self) -> Batch:
        """The longest prompts, each with as many and as long answers as possible."""
        assert self.answers is not None
        longest = np.argsort(self.sizes, kind="stable")[-self.rows_per_batch :].tolist()
        filler = np.full(self.answers.most_tokens, self.pad_id, dtype=np.int32)
        prompts = [self.rows[row][0] for row in self.rows_in(longest) for _ in range(self.answers.per_row)]
        documents = [
            (np.concatenate([ids, filler]), np.concatenate([np.full_like(ids, IGNORED), filler])) for ids in prompts
        ]
        return self.of_documents(replace(Rows.of(documents), unit=self.answers.per_row), self.longest_document)

    @property
    def longest_document(self) -> int:
        """Upper bound of the tokens of a document."""
        return self.max_length + (self.answers.most_tokens if self.answers is not None else 0)

    @property
    def largest(self) -> Shape:
        """Upper bound of the size and the number of labels of any batch."""
        rows = min(self.rows_per_batch, len(self.packs)) * self.rows.unit
        trained = int(self._largest_of(self._trained).sum())
        if self.answers is not None:
            count, more = rows * self.answers.per_row, self.answers.most_tokens
            lengths, trained = self._largest_of(self.sizes) + more, count * more
            if self.shares_prompts:  # another answer begins with the last token of its prompt
                return Shape(1, _rounded(int(lengths.sum()) + rows * (self.answers.per_row - 1) * (more + 1)), trained)
            if self.by_document:
                return Shape(1, _rounded(int(lengths.sum()) * self.answers.per_row), trained)
            longest = int(lengths.max())
            return Shape(count, max(longest, min(_rounded(longest), self.longest_document)), trained)
        if self.end_to_end:
            return Shape(1, self._padded(int(self._largest_of(self._computed_sizes).sum())), trained)
        return Shape(self.rows_per_batch if self.packing else rows, self._padded(int(self._longest.max())), trained)

    @property
    def computed_share(self) -> float:
        """The tokens that are computed, as a part of those that the rows have; below 1 where sequences share some."""
        if self.answers is not None and self.shares_prompts:
            copies, more, prompt = self.answers.per_row, self.answers.most_tokens, float(self.sizes.mean())
            return (prompt + more + (copies - 1) * (more + 1)) / (copies * (prompt + more))
        return int(self._computed_sizes.sum()) / int(self.sizes.sum())

    def _computed_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of these rows without those that another row computes."""
        return self.rows.lengths_of(rows) - (0 if self.shared is None else self.shared[rows])

    @property
    def _computed_sizes(self) -> np.ndarray:
        """``sizes`` without the tokens that another row computes."""
        return self.sizes if self.shared is None else self.packs.numbers(self._computed_lengths)

    @functools.cached_property
    def _trained(self) -> np.ndarray:
        """Number of labels in each pack."""
        return self.packs.numbers(self.rows.labels_per_row.__getitem__)

    @functools.cached_property
    def _longest(self) -> np.ndarray:
        """Tokens of the longest row of each pack."""
        return self.packs.numbers(self.rows.lengths_of, np.maximum)

    def _largest_of(self, counts: np.ndarray) -> np.ndarray:
        """The ``rows_per_batch`` largest counts: the worst case of one batch."""
        return np.sort(counts)[-self.rows_per_batch :]

    @property
    def efficiency(self) -> float:
        """Fraction of the computed positions that are not padding, in the first epoch."""
        if self.packing and not self.end_to_end:
            return float(self.sizes.sum() / (len(self.packs) * self.pack_length))
        order = np.array(self.packs_of_pass())
        parts = np.split(order, range(self.rows_per_batch, len(self.packs), self.rows_per_batch))
        if self.end_to_end:
            sizes = self._computed_sizes
            return float(sizes.sum() / sum(self._padded(int(sizes[part].sum())) for part in parts))
        computed = sum(len(part) * self.rows.unit * self._padded(int(self._longest[part].max())) for part in parts)
        return float(self.sizes.sum() / computed)

    def _padded(self, length: int) -> int:
        """The row length T of a batch whose longest row has ``length`` tokens."""
        if self.end_to_end:
            return _rounded(length)
        if self.packing:
            return self.pack_length
        return max(length, min(_rounded(length), self.max_length))


def _rounded(length: int) -> int:
    """The length rounded up to a multiple of ``PADDED_TO``."""
    return -(-max(length, 1) // PADDED_TO) * PADDED_TO
