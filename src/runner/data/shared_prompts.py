"""Sequences of a unit that begin with the same tokens, such as the two answers to one prompt.

No token depends on later ones, so a model computes equal beginnings equally: it needs to compute them only once. The
first sequence of a unit is computed whole, and of the others what follows the shared tokens, which they attend to.
"""

from __future__ import annotations

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
    firsts = np.arange(0, len(rows), rows.unit)
    for number in range(1, rows.unit):
        for start in range(0, len(firsts), UNITS_AT_ONCE):
            block = firsts[start : start + UNITS_AT_ONCE]
            shared[block + number] = _common(rows, block, block + number)
    return shared


def _common(rows: Rows, first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The number of shared tokens of each pair of rows (pairs,)."""
    most = np.minimum(rows.lengths[first], rows.lengths[other]) - 1  # (pairs,)
    starts = np.cumsum(most) - most
    within = np.arange(int(most.sum())) - np.repeat(starts, most)  # the position in its row of each compared token
    a, b = (np.repeat(rows.offsets[each], most) + within for each in (first, other))
    ends = (rows.ids[a] != rows.ids[b]) | (rows.labels[b + 1] != IGNORED)
    before_end = np.where(ends, within, np.repeat(most, most))
    counts = most.copy()
    filled = most > 0  # reduceat cannot reduce nothing
    counts[filled] = np.minimum.reduceat(before_end, starts[filled]) if filled.any() else counts[filled]
    return counts
