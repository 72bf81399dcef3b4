"""Documents are packed: each once, best fit, never too much."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import numpy as np
import pytest
from fixtures.documents import own_cache

from runner.data.packing import pack


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_each_document_once_and_never_too_much(seed):
    lengths = np.random.default_rng(seed).integers(1, 129, 500)
    packs = pack(lengths, 128)
    assert sorted(packs.rows.tolist()) == list(range(500))
    sizes = np.add.reduceat(lengths[packs.rows], packs.offsets[:-1])
    assert sizes.max() <= 128
    assert sorted(sizes) == sorted(128 - left for left in spaces_left(lengths, 128))


def spaces_left(lengths: np.ndarray, capacity: int) -> list[int]:
    """Best-fit decreasing as the textbook has it, in O(n²)."""
    left: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [number for number, space in enumerate(left) if space >= length]
        if not fitting:
            left.append(capacity - length)
        else:
            left[min(fitting, key=lambda number: left[number])] -= length
    return left


def test_packing_is_best_fit_decreasing():
    packs = pack(np.array([2, 5, 7, 1, 4]), 10)
    members = [packs.rows[a:b].tolist() for a, b in zip(packs.offsets, packs.offsets[1:], strict=False)]
    assert members == [[2, 0, 3], [1, 4]]  # 7 + 2 + 1, 5 + 4
