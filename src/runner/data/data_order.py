"""The data order: which packs each optimizer step computes, as a pure function of (seed, step)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from runner.data import column_files
from runner.data.interleaving import Interleaving, Stream
from runner.data.packing import SourcePart
from runner.errors import ConfigError, Fault

ALONE = (SourcePart("", 0),)
"""One source without a name."""


class DataOrder:
    """The order of the packs over all epochs, for all ranks together.

    Every epoch of a source has its own order, and each source gets its share, see ``Interleaving``. A step takes the
    next ``per_step`` packs, possibly across the end of an epoch. An epoch of several sources is as many packs as they
    have together. With ``epochs``, the data end after that many epochs, and the last step may have fewer packs.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        per_step: int,
        seed: int,
        shuffle: bool,
        epochs: float | None = None,
        parts: Sequence[SourcePart] = ALONE,
        owners: np.ndarray | None = None,
        counted: np.ndarray | None = None,
        max_repeats: float = math.inf,
        places: np.ndarray | None = None,
    ) -> None:
        """``sizes``: (packs,) tokens of each pack. With several ``parts``, the sources: ``owners``, (packs,) the number
        of the part of each pack, and ``counted``, (packs,) what counts for its share. ``places``, (packs,): an epoch of
        a source is in their order, and packs of equal places are shuffled; None: all packs are."""
        self.sizes, self.per_step, self.seed, self.shuffle, self.epochs = sizes, per_step, seed, shuffle, epochs
        small = column_files.index_type(len(sizes))
        if owners is None:
            members = [np.arange(len(sizes), dtype=small)]
        else:
            members = [np.flatnonzero(owners == number).astype(small) for number in range(len(parts))]
        counted = sizes if counted is None else counted
        self._members, self._places = members, places
        self._of_epoch = functools.lru_cache(maxsize=2 * len(parts))(self._draw)
        self._packs = Interleaving(
            [
                Stream(
                    packs,
                    counted if owners is None else counted[packs],
                    part.weight,
                    functools.partial(self._of_epoch, number),
                    part.name,
                )
                for number, (packs, part) in enumerate(zip(members, parts, strict=True))
            ],
            max_repeats,
        )

    def packs_of_step(self, i: int) -> list[int]:
        """The packs of optimizer step ``i`` (from 0)."""
        count, positions = self._packs.length, range(self.packs_before(i), self.packs_before(i + 1))
        return [int(self._packs.block(p // count)[p % count]) for p in positions]

    def packs_of_pass(self, part: int | None = None) -> list[int]:
        """Every pack once, in the order of the first epoch; those of one part alone if it is given."""
        numbers = range(len(self._members)) if part is None else [part]
        return [int(pack) for number in numbers for pack in self._members[number][self._of_epoch(number, 0)]]

    def packs_before(self, step: int) -> int:
        """Number of packs in the first ``step`` steps."""
        return min(step * self.per_step, self._end())

    def tokens_before(self, step: int) -> int:
        """Tokens without padding in the first ``step`` steps."""
        return self._packs.sum_before(self.packs_before(step), self.sizes)

    def repeats(self, steps: int) -> dict[str, float]:
        """Name of each source → how many times its packs come in the first ``steps`` steps.

        Raises:
            ConfigError: a source of a mixture is repeated more than ``max_repeats`` times.
        """
        return self._packs.repeats(self.packs_before(steps))

    def epoch(self, step: int) -> float:
        """Number of epochs, as a fraction, after ``step`` steps."""
        return float(self.packs_before(step) / len(self.sizes))

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

    def _draw(self, part: int, epoch: int) -> np.ndarray:
        """The order of one part in one epoch, from PCG64's raw numbers: numpy guarantees that they never change."""
        count = len(self._members[part])
        if not self.shuffle:
            return np.arange(count)
        numbers = np.random.PCG64([self.seed % 2**64, epoch, *([part] if part else [])]).random_raw(count)
        if self._places is None:
            order = np.argsort(numbers, kind="stable")
        else:
            order = np.lexsort((numbers, self._places[self._members[part]]))
        return order.astype(column_files.index_type(count))

    def _packs_of(self, epochs: float) -> int:
        return math.ceil(epochs * len(self.sizes) - 1e-6)

    def _packs_until(self, tokens: int) -> int:
        count, total = self._packs.length, int(self.sizes.sum())
        block = tokens // total if len(self._members) == 1 else 0
        while self._packs.sum_before((block + 1) * count, self.sizes) <= tokens:
            block += 1
        within = np.cumsum(self.sizes[self._packs.block(block)])
        rest = tokens - self._packs.sum_before(block * count, self.sizes)
        return block * count + int(np.searchsorted(np.concatenate([[0], within]), rest))

    def _end(self) -> int:
        return self._packs_of(self.epochs) if self.epochs is not None else 2**62
