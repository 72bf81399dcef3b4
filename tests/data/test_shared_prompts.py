"""What the sequences of a unit begin with is found as by comparing them token by token."""

from __future__ import annotations

import numpy as np
import pytest

from runner.data import joined, shared_prompts
from runner.data.packing import IGNORED, Rows, one_by_one
from runner.data.shared_prompts import shared_lengths


def rows(*documents: tuple[list[int], int], unit: int = 2) -> Rows:
    """Documents of these ids whose labels begin at a position."""
    given = [(np.array(ids), np.array(([IGNORED] * start + ids[start:])[: len(ids)])) for ids, start in documents]
    plain = Rows.of(given)
    return Rows(plain.ids, plain.labels, plain.offsets, one_by_one(len(documents), unit), unit)


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        (([1, 2, 3, 4, 5], 3), ([1, 2, 3, 6], 3), 2),  # the last token of the prompt has a label in both
        (([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4, 6], 4), 3),
        (([1, 2, 3, 4], 1), ([1, 2, 3, 5], 3), 2),  # what is trained in the first one alone is its own
        (([1, 2, 3, 4], 3), ([1, 2], 1), 0),
        (([1, 2], 1), ([1, 2, 3, 4], 3), 1),  # each keeps a token
        (([9, 2, 3], 2), ([1, 2, 3], 2), 0),
        (([1], 1), ([1, 2], 1), 0),
    ],
)
def test_no_token_with_a_loss_of_its_own_is_shared(first, other, expected):
    assert shared_lengths(rows(first, other)).tolist() == [0, expected]


@pytest.mark.parametrize("of_several_sources", [False, True])
def test_many_units_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch, of_several_sources: bool):
    generator = np.random.default_rng(0)
    documents = [(generator.integers(0, 2, generator.integers(1, 9)).tolist(), 9) for _ in range(60)]
    monkeypatch.setattr(shared_prompts, "UNITS_AT_ONCE", 7)
    given = rows(*documents, unit=3)
    if of_several_sources:
        given = joined.join(dict.fromkeys("ab", (given, 1.0)))
    found = shared_lengths(given)
    for row in range(len(given)):
        (ids, _), (first, _) = given[row], given[row - row % 3]
        most = min(len(ids), len(first)) - 1 if row % 3 else 0
        assert found[row] == next((at for at in range(most) if ids[at] != first[at]), most)
