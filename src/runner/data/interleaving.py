"""The packs of several sources in one endless order, in which each source has its share.

The next pack is of the source that has taken least in proportion to its weight, so that shares are exact to within a
pack of each source at any position. Everything is a pure function of the position: a resumed run needs nothing saved.
The order is drawn in blocks, so that its memory does not grow with the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runner.errors import ConfigError, Fault

MOST_PER_BLOCK = 2**16
"""Packs of several streams that are drawn together."""


@dataclass(frozen=True)
class Stream:
    """The packs of one source, epoch after epoch."""

    packs: np.ndarray
    """(packs,) their numbers among the packs of all sources."""
    sizes: np.ndarray
    """(packs,) what counts for the share of the source."""
    weight: float
    draw: Callable[[int], np.ndarray]
    """Epoch → order, (packs,): positions in ``packs``."""
    name: str = ""

    def upcoming(self, taken: int, count: int) -> np.ndarray:
        """The next ``count`` positions in ``packs`` after the first ``taken``."""
        epoch, start = divmod(taken, len(self.packs))
        orders = [self.draw(epoch)[start:]]
        while sum(map(len, orders)) < count:
            orders.append(self.draw(epoch + len(orders)))
        return np.concatenate(orders)[:count]

    def sum_before(self, taken: int, sizes: np.ndarray) -> int:
        """The sum of ``sizes``, (packs,), over the first ``taken`` packs."""
        epochs, rest = divmod(taken, len(self.packs))
        return epochs * int(sizes.sum()) + (int(sizes[self.draw(epochs)[:rest]].sum()) if rest else 0)


class Interleaving:
    """The packs of all streams in blocks of ``length`` packs; a block of a single stream is one of its epochs.

    The order of a single stream is its own.
    """

    def __init__(self, streams: Sequence[Stream], max_repeats: float) -> None:
        self.streams, self.max_repeats = streams, max_repeats
        packs = sum(len(stream.packs) for stream in streams)
        self.length = packs if len(streams) == 1 else min(packs, MOST_PER_BLOCK)
        self._begins = [(0,) * len(streams)]
        """Packs of each stream before each block."""
        self._sums = [(0,) * len(streams)]
        """Of the ``sizes`` of these."""
        self._drawn = functools.lru_cache(maxsize=2)(self._draw)

    def block(self, number: int) -> np.ndarray:
        """The packs of a block, (length,)."""
        return self._drawn(number)[0]

    def taken(self, position: int) -> tuple[int, ...]:
        """How many packs of each stream come before a position."""
        number, rest = divmod(position, self.length)
        if len(self.streams) == 1:
            return (position,)
        while len(self._begins) <= number:
            self._refuse_repeats(self._begins[-1])
            self._append(*self._drawn(len(self._begins) - 1)[1:])
        within = self._drawn(number)[1][:rest] if rest else np.array([], dtype=np.int64)
        return tuple(np.add(self._begins[number], self._counted(within)).tolist())

    def repeats(self, position: int) -> dict[str, float]:
        """Name of each stream → how many times its packs come before a position.

        Raises:
            ConfigError: more often than ``max_repeats``.
        """
        taken = self.taken(position)
        self._refuse_repeats(taken)
        return {stream.name: count / len(stream.packs) for stream, count in zip(self.streams, taken, strict=True)}

    def sum_before(self, position: int, sizes: np.ndarray) -> int:
        """The sum of ``sizes``, one of each pack, over the packs before a position."""
        parts = zip(self.streams, self.taken(position), strict=True)
        return sum(stream.sum_before(count, sizes[stream.packs]) for stream, count in parts)

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """(packs of a block, the number of the stream of each, the sum of the sizes of each stream)."""
        if len(self.streams) == 1:
            stream = self.streams[0]
            packs_of_epoch = stream.packs[stream.draw(number)]
            return packs_of_epoch, np.broadcast_to(np.zeros(1, dtype=np.int64), self.length), (0,)
        packs, sizes, keys = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        befores = self.taken(number * self.length)
        for stream, before, total in zip(self.streams, befores, self._sums[number], strict=True):
            upcoming = stream.upcoming(before, self.length)
            sizes.append(stream.sizes[upcoming])
            keys.append((total + np.cumsum(sizes[-1]) - sizes[-1]) / stream.weight)
            packs.append(stream.packs[upcoming])
        first = np.argsort(np.concatenate(keys), kind="stable")[: self.length]
        owners = first // self.length
        counts = zip(sizes, self._counted(owners), strict=True)
        return np.concatenate(packs)[first], owners, tuple(int(each[:count].sum()) for each, count in counts)

    def _append(self, owners: np.ndarray, sums: tuple[int, ...]) -> None:
        """Note what comes before the next block."""
        self._begins.append(tuple(np.add(self._begins[-1], self._counted(owners)).tolist()))
        self._sums.append(tuple(np.add(self._sums[-1], sums).tolist()))

    def _counted(self, owners: np.ndarray) -> np.ndarray:
        return np.bincount(owners, minlength=len(self.streams))

    def _refuse_repeats(self, taken: Sequence[int]) -> None:
        if len(self.streams) == 1:
            return
        rates = [count / len(stream.packs) for stream, count in zip(self.streams, taken, strict=True)]
        if max(rates) <= self.max_repeats:
            return
        stream = self.streams[int(np.argmax(rates))]
        problem = f"with this weight the run repeats its rows more than {self.max_repeats:g} times"
        remedy = "lower the weight, add rows, train for fewer steps, or raise data.max_repeats"
        raise ConfigError(Fault(f"data.sources.{stream.name}", problem, remedy))
