"""Sequences of a unit that begin with the same tokens, such as the two answers to one prompt.

No token depends on later ones, so a model computes equal beginnings equally: it needs to compute them only once. The
first sequence of a unit is computed whole, and of the others what follows the shared tokens, which they attend to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from runner.data.packing import IGNORED, Rows

UNITS_AT_ONCE = 10_000
"""Units that are compared at a time: the memory of more would not be free."""


def shared_lengths(rows: Rows) -> np.ndarray:
    """Of each row, how many of its first tokens the first row of its unit computes for it: (rows,) int64.

    0 for the first row itself. No token counts whose next one is trained in the row: at such a position the row has a
    loss of its own. Each row keeps a token of its own, and so does the first one.
    """
    shared = np.zeros(len(rows), dtype=np.int64)
    for start, end in _blocks(rows):
        offsets = rows.offsets[start : end + 1]
        cut = slice(offsets[0], offsets[-1])
        block = _Block(rows.ids[cut], rows.labels[cut], offsets - offsets[0])
        first = np.arange(0, len(offsets) - 1, rows.unit)
        for number in range(1, rows.unit):
            shared[start + first + number] = block.common(first, first + number)
    return shared


def _blocks(rows: Rows) -> Iterator[tuple[int, int]]:
    """(first row, end) of neighbouring rows that are compared at a time: those of one source, see ``joined.Chain``."""
    ends = np.cumsum([part.rows for part in rows.parts] or [len(rows)]).tolist()
    for begin, end in itertools.pairwise([0, *ends]):
        for start in range(begin, end, UNITS_AT_ONCE * rows.unit):
            yield start, min(start + UNITS_AT_ONCE * rows.unit, end)


class _Block(NamedTuple):
    """Some neighbouring rows, as ``Rows``."""

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def common(self, first: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The number of shared tokens of each pair of rows (pairs,)."""
        lengths = np.diff(self.offsets)
        most = np.minimum(lengths[first], lengths[other]) - 1  # (pairs,)
        starts = np.cumsum(most) - most
        within = np.arange(int(most.sum())) - np.repeat(starts, most)  # the position in its row of each compared token
        a, b = (np.repeat(self.offsets[each], most) + within for each in (first, other))
        ends = (self.ids[a] != self.ids[b]) | (self.labels[b + 1] != IGNORED)
        before_end = np.where(ends, within, np.repeat(most, most))
        counts = most.copy()
        filled = most > 0  # reduceat cannot reduce nothing
        if filled.any():
            counts[filled] = np.minimum.reduceat(before_end, starts[filled])
        return counts
