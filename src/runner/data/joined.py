"""Rows of several sources as one: their arrays stay memory-mapped where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runner.data import column_files
from runner.data.packing import Packs, Rows, SourcePart
from runner.data.texts import Texts


class Chain:
    """Concatenated arrays, without a copy in memory. A slice must be within one of them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, cut: slice) -> np.ndarray:
        number = min(int(np.searchsorted(self._starts, cut.start, side="right")), len(self.arrays)) - 1
        start = int(self._starts[number])
        return self.arrays[number][cut.start - start : cut.stop - start]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.arrays).astype(dtype or self.arrays[0].dtype)


def join(parts: Mapping[str, tuple[Rows, float]]) -> Rows:
    """The rows of all parts, name → (rows, weight); packs hold rows of one part."""
    rows = [each for each, _ in parts.values()]
    if len(rows) == 1 and list(parts) == [""]:
        return rows[0]
    row_starts = np.cumsum([0, *map(len, rows)])
    members = np.empty(sum(len(each.packs.rows) for each in rows), dtype=column_files.index_type(int(row_starts[-1])))
    end = 0
    for each, start in zip(rows, row_starts, strict=False):
        end += len(each.packs.rows)
        np.add(each.packs.rows, start, out=members[end - len(each.packs.rows) : end], casting="unsafe")
    packs = Packs(members, _offsets([each.packs.offsets for each in rows]))
    has_weights = any(each.weights is not None for each in rows)
    ones = np.ones(1, dtype=np.float32)
    weights = [np.broadcast_to(ones, len(each.ids)) if each.weights is None else each.weights for each in rows]
    return Rows(
        ids=_chain([each.ids for each in rows]),
        labels=_chain([each.labels for each in rows]),
        offsets=_offsets([each.offsets for each in rows]),
        packs=packs,
        unit=rows[0].unit,
        values={name: np.concatenate([each.values[name] for each in rows]) for name in rows[0].values},
        weights=_chain(weights) if has_weights else None,
        records=_texts([each.records for each in rows]),
        trained=np.concatenate([each.labels_per_row for each in rows], dtype=np.int32, casting="unsafe"),
        places=_places(rows),
        images=_texts([each.images for each in rows]),
        parts=tuple(SourcePart(name, len(each), weight) for name, (each, weight) in parts.items()),
    )


def _places(rows: Sequence[Rows]) -> np.ndarray | None:
    """Those of all parts; equal ones, which are shuffled, in parts without an order."""
    if all(each.places is None for each in rows):
        return None
    return np.concatenate([np.zeros(len(each), np.int64) if each.places is None else each.places for each in rows])


def _chain(arrays: Sequence[np.ndarray]) -> Any:
    """As an array where rows are read; a ``Chain`` has the parts of an array that reading needs."""
    return Chain(arrays)


def _offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Offsets of arrays one behind the other, from those of each."""
    offsets, start, end = np.zeros(sum(len(each) - 1 for each in parts) + 1, dtype=np.int64), 0, 0
    for each in parts:
        np.add(each[1:], start, out=offsets[end + 1 : end + len(each)])
        start, end = start + int(each[-1]), end + len(each) - 1
    return offsets


def _texts(parts: Sequence[Texts | None]) -> Texts | None:
    given = [each for each in parts if each is not None]
    if not given:
        return None
    return Texts(_chain([each.characters for each in given]), _offsets([each.offsets for each in given]))
