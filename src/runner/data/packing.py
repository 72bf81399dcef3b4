"""Tokenised rows on disk, and the batches made of them: packed to a fixed length, padded, or laid end to end.

A batch is a dict: ``input_ids``, ``labels`` and ``position_ids`` (B, T) int64, and the ints ``tokens`` (useful ones,
padding aside) and ``trained``. Labels are shifted: ``labels[b, t]`` is the token to predict at ``t``, or -100; the last
token of a document predicts nothing. In packed rows position ids restart at 0 with each document, and the padding at
the end is a document of its own.

``document_ends`` (documents + 1,) int32 says where documents end when the rows are laid end to end, from 0 to B * T;
ends repeat so that packed batches have equally many. No document is longer than the int ``longest``. ``trained_at``
(trained,) int64 are the positions with a label, in the same order.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IGNORED = -100
"""The label of a position where nothing is trained, as in torch and transformers."""


@dataclass(frozen=True)
class Packs:
    """Which rows share a pack: ``rows[offsets[k] : offsets[k + 1]]`` are those of pack ``k``."""

    rows: np.ndarray  # (rows,) int64
    offsets: np.ndarray  # (packs + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Rows:
    """The tokens of one split: flat columns, memory-mapped, cut into rows by offsets. Labels are not shifted."""

    ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (rows + 1,) int64
    packs: Packs

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of one row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        cut = slice(self.offsets[row], self.offsets[row + 1])
        return self.ids[cut], self.labels[cut]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def save(self, folder: Path, name: str) -> None:
        """Write the columns as ``<name>.<column>.npy``, through to the disk."""
        for column, values in self._columns().items():
            with (folder / f"{name}.{column}.npy").open("wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path, name: str) -> Rows:
        """Map what ``save`` wrote into memory.

        Raises:
            OSError, ValueError: a file is missing or damaged.
        """
        ids, labels, offsets, rows, packs = (
            np.load(folder / f"{name}.{column}.npy", mmap_mode="r")
            for column in ("ids", "labels", "offsets", "pack_rows", "pack_offsets")
        )
        if not len(ids) == len(labels) == offsets[-1] or not len(rows) == packs[-1] == len(offsets) - 1:
            raise ValueError(f"the columns of {name} do not fit each other")
        return cls(ids, labels, offsets, Packs(rows, packs))

    def _columns(self) -> dict[str, np.ndarray]:
        packs = {"pack_rows": self.packs.rows, "pack_offsets": self.packs.offsets}
        return {"ids": self.ids, "labels": self.labels, "offsets": self.offsets, **packs}


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Best-fit decreasing: the longest rows first, each into the fullest pack that has room. Deterministic.

    O(n log n); no length may exceed ``capacity``. See Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    packs: list[list[int]] = []
    having: list[list[int]] = [[] for _ in range(capacity + 1)]  # by slots left: packs
    open_spaces = 0  # bit s is set where some pack has s slots left
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the tightest fit
            number = having[space].pop()
            if not having[space]:
                open_spaces ^= 1 << space
        else:
            space, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        having[space - length].append(number)
        open_spaces |= 1 << (space - length)
    rows = np.array([row for members in packs for row in members], dtype=np.int64)
    return Packs(rows, np.cumsum([0, *map(len, packs)], dtype=np.int64))


def one_by_one(count: int) -> Packs:
    """Each row a pack of its own."""
    return Packs(np.arange(count), np.arange(count + 1))
