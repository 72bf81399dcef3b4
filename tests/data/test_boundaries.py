"""Boundaries of documents: exact, and dense enough for kernels that work on documents times longest."""

from __future__ import annotations

import numpy as np
import pytest

from runner.data import boundaries
from runner.data.packing import pack


def alpaca_like(seed: int, longest: int) -> np.ndarray:
    """Lengths of rows such as Alpaca's: 85 tokens in the middle, a few very long."""
    lengths = np.random.default_rng(seed).lognormal(np.log(85), 0.7, 3000)
    return np.clip(lengths, 2, longest).astype(int)


@pytest.mark.parametrize(("width", "rows"), [(1024, 4), (2048, 8), (4096, 2), (8192, 2)])
def test_every_part_of_a_packed_batch_is_dense(width: int, rows: int) -> None:
    lengths = alpaca_like(width, width)
    packs = pack(lengths, width)
    order = np.random.default_rng(1).permutation(len(packs))
    calls = 0
    for start in range(0, len(order), rows):
        chosen = [
            lengths[packs.rows[packs.offsets[k] : packs.offsets[k + 1]]].tolist() for k in order[start : start + rows]
        ]
        chosen += [[]] * (rows - len(chosen))
        ends, parts = boundaries.of_packs(chosen, width, width)
        assert all(part.is_dense for part in parts)
        assert sum(part.tokens for part in parts) == ends[-1] == rows * width
        assert sum(part.documents for part in parts) == len(ends) - 1
        whole = [int(length) for length in np.diff(ends) if length]
        assert [length for length in whole if length in chosen[0]][: len(chosen[0])] == chosen[0]
        calls += len(parts)
    assert calls <= rows * -(-len(order) // rows)


def test_one_long_document_among_many_short_ones_is_computed_apart() -> None:
    documents = [30] * 20 + [2048] + [30] * 100
    ends, parts = boundaries.of_row(documents, sum(documents) + 5, 4096)
    assert np.diff(ends).tolist() == [*documents, 5]
    assert len(parts) == 3
    assert all(part.is_dense for part in parts)
    assert sum(part.tokens for part in parts) == ends[-1]


def test_few_shapes_are_compiled() -> None:
    lengths = alpaca_like(0, 2048)
    packs = pack(lengths, 2048)
    chosen = [lengths[packs.rows[a:b]].tolist() for a, b in zip(packs.offsets, packs.offsets[1:], strict=False)]
    shapes = {boundaries.of_packs([each], 2048, 2048).parts for each in chosen}
    assert len(chosen) > 100
    assert len(shapes) < 25


def test_a_limit_that_is_no_power_of_two_is_kept() -> None:
    """A sliding window as long as the longest document must not matter."""
    assert {part.longest for part in boundaries.of_packs([[700, 60]], 1536, 768).parts} == {768}
    assert {part.longest for part in boundaries.of_row([700], 704, 768).parts} == {768}
