"""Store tokenised rows on disk, and choose which rows share a packed sequence."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runner.data.column_files import blocks, open_columns
from runner.data.texts import Texts

IGNORED = -100
"""The label of a position without loss, as in torch and transformers."""
VALUE = "value-"
"""In the file names of ``Rows.values``."""
RECORD_COLUMNS = ("records", "record_offsets")
"""In the file names of ``Rows.records``."""
IMAGE_COLUMNS = ("images", "image_offsets")
"""In the file names of ``Rows.images``."""
PACKS_AT_ONCE = 2**13
"""Packs whose rows are looked at together; without packing of short rows, a pack may have hundreds."""


@dataclass(frozen=True)
class Packs:
    """Which rows share a pack: pack ``k`` contains ``rows[offsets[k] : offsets[k + 1]]``."""

    rows: np.ndarray  # (rows,) int64, or int32
    offsets: np.ndarray  # (packs + 1,) int64

    @classmethod
    def chained(cls, parts: Iterable[Packs], folder: Path | None, name: str) -> Packs:
        """The packs of all parts, in the files of ``Rows.save`` if there is a folder."""
        rows, offsets = open_columns({"pack_rows": "q", "pack_offsets": "q"}, folder, name).values()
        offsets.append(0)
        for part in parts:
            offsets.extend_array(part.offsets[1:] + len(rows))
            rows.extend_array(part.rows)
        return cls(rows.finish(), offsets.finish())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def numbers(self, of_rows: Callable[[np.ndarray], np.ndarray], together: np.ufunc = np.add) -> np.ndarray:
        """A number of each pack, (packs,) int64, from those of its rows; ``of_rows``: rows → a number of each."""
        found = np.empty(len(self), dtype=np.int64)
        for part in blocks(len(self), PACKS_AT_ONCE):
            ends = self.offsets[part.start : part.stop + 1]
            found[part] = together.reduceat(of_rows(self.rows[ends[0] : ends[-1]]), ends[:-1] - ends[0])
        return found

    def apart(self, unit: int) -> Packs:
        """The same rows in their order, each unit of ``unit`` rows in a pack of its own."""
        return Packs(rows := np.sort(self.rows), np.arange(0, len(rows) + 1, unit))

    def without(self, left_out: np.ndarray) -> Packs:
        """The packs without these rows: (all rows,) bool. Packs that would be empty are left out."""
        kept = ~left_out[self.rows]
        counts = np.add.reduceat(kept, self.offsets[:-1], dtype=np.int64)
        return Packs(self.rows[kept], np.cumsum([0, *counts[counts > 0]], dtype=np.int64))


@dataclass(frozen=True)
class SourcePart:
    """The rows of one source among those of several, which follow each other."""

    name: str
    rows: int
    weight: float = 1.0
    """In training the share of the source; in an evaluation 1 if its rows count in the metrics of all, else 0."""


@dataclass(frozen=True)
class Rows:
    """The tokens of one split as flat memory-mapped arrays; ``offsets`` marks the rows. Labels are not shifted.

    Rows ``k * unit`` to ``(k + 1) * unit - 1`` are a unit, such as the two answers of a preference pair: they stay in
    one micro-batch.
    """

    ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (rows + 1,) int64
    packs: Packs
    unit: int = 1
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Numbers that a task gives each row, by name: (rows,) float32."""
    weights: np.ndarray | None = None
    """The weight of each label, (tokens,) float32; None: 1."""
    records: Texts | None = None
    """A text that a task gives each row: what its reward functions are given of the row."""
    prompts: np.ndarray | None = None
    """A hash of each row's prompt, (rows,) uint64: rows with equal ones must not be both trained and held out."""
    trained: np.ndarray | None = None
    """``labels_per_row`` where it is known already."""
    parts: tuple[SourcePart, ...] = ()
    """The sources of the rows, if they have names."""
    of_labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What a teacher gives each label but the first token's, row by row: (labels, …) by name; not saved."""
    places: np.ndarray | None = None
    """The place of each row in the order of ``data.order_by``, (rows,) int64; None: shuffled."""
    images: Texts | None = None
    """Where the images of each row are, as JSON (``images.Reference``); None: the model reads text alone."""

    @classmethod
    def of(cls, documents: Sequence[tuple[np.ndarray, np.ndarray]], **values: Sequence[float]) -> Rows:
        """Rows in memory: (token ids, labels) of each document, and numbers of each by name."""
        columns = [np.concatenate([np.array([], np.int32), *(each[at] for each in documents)]) for at in (0, 1)]
        ids, labels = (column.astype(np.int32) for column in columns)
        offsets = np.cumsum([0, *(len(each[0]) for each in documents)], dtype=np.int64)
        numbers = {name: np.array(each, dtype=np.float32) for name, each in values.items()}
        return cls(ids, labels, offsets, one_by_one(len(documents)), values=numbers)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of one row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        cut = slice(self.offsets[row], self.offsets[row + 1])
        return self.ids[cut], self.labels[cut]

    def owners(self, rows: np.ndarray) -> np.ndarray:
        """The number of the part of each of these rows."""
        return np.searchsorted(np.cumsum([part.rows for part in self.parts]), rows, side="right")

    def weights_of(self, row: int) -> np.ndarray:
        """The weights of the labels of one row."""
        assert self.weights is not None
        return self.weights[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (rows,); of many rows, ``lengths_of`` those that are needed needs less memory."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of these rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @functools.cached_property
    def labels_per_row(self) -> np.ndarray:
        """(rows,) number of labels, without that of the first token, which is never predicted."""
        if self.trained is not None:
            return self.trained
        counts = np.add.reduceat(self.labels != IGNORED, self.offsets[:-1], dtype=np.int64)
        return counts - (self.labels[self.offsets[:-1]] != IGNORED)

    @functools.cached_property
    def label_offsets(self) -> np.ndarray:
        """Where the labels of each row begin in ``of_labels``, (rows + 1,)."""
        return np.concatenate([[0], np.cumsum(self.labels_per_row)])

    def labels_of(self, rows: np.ndarray, column: np.ndarray) -> np.ndarray:
        """The part of a column of ``of_labels`` that belongs to these rows, in their order."""
        starts = self.label_offsets
        return np.concatenate([column[:0], *(column[starts[row] : starts[row + 1]] for row in rows)])

    def save(self, folder: Path, name: str) -> None:
        """Write each column to ``<name>.<column>.npy`` and fsync it; those that are files there already stay."""
        if self.weights is None:
            (folder / f"{name}.weights.npy").unlink(missing_ok=True)
        for column, values in self._columns().items():
            if isinstance(values, np.memmap) and (folder / f"{name}.{column}.npy").exists():
                continue
            with (folder / f"{name}.{column}.npy").open("wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path, name: str) -> Rows:
        """Memory-map the files written by ``save``.

        Raises:
            OSError, ValueError: a file is missing or damaged.
        """
        ids, labels, offsets, rows, packs, unit = (
            np.load(folder / f"{name}.{column}.npy", mmap_mode="r")
            for column in ("ids", "labels", "offsets", "pack_rows", "pack_offsets", "unit")
        )
        paths = sorted(folder.glob(f"{name}.{VALUE}*.npy"))
        values = {path.name.split(VALUE, 1)[1][: -len(".npy")]: np.load(path, mmap_mode="r") for path in paths}
        file = folder / f"{name}.weights.npy"
        weights = np.load(file, mmap_mode="r") if file.exists() else None
        records = None
        if (folder / f"{name}.records.npy").exists():
            records = Texts(*(np.load(folder / f"{name}.{each}.npy", mmap_mode="r") for each in RECORD_COLUMNS))
        prompts, trained = (np.load(folder / f"{name}.{each}.npy", mmap_mode="r") for each in ("prompts", "trained"))
        file = folder / f"{name}.places.npy"
        places = np.load(file, mmap_mode="r") if file.exists() else None
        images = None
        if (folder / f"{name}.images.npy").exists():
            images = Texts(*(np.load(folder / f"{name}.{each}.npy", mmap_mode="r") for each in IMAGE_COLUMNS))
        others = [prompts, trained, *values.values(), *(x for x in (records, places, images) if x is not None)]
        lengths = [len(offsets) - 1, len(rows), int(packs[-1]), *map(len, others)]
        tokens = [len(ids), len(labels), offsets[-1], *([] if weights is None else [len(weights)])]
        if len(set(map(int, tokens))) > 1 or len(set(lengths)) > 1:
            raise ValueError(f"the columns of {name} have inconsistent lengths")
        return cls(ids, labels, offsets, Packs(rows, packs), int(unit), values, weights, records, prompts, trained,
                   places=places, images=images)  # fmt: skip

    def _columns(self) -> dict[str, np.ndarray]:
        packs = {"pack_rows": self.packs.rows, "pack_offsets": self.packs.offsets, "unit": np.array(self.unit)}
        values = {f"{VALUE}{name}": numbers for name, numbers in self.values.items()}
        weights = {} if self.weights is None else {"weights": self.weights}
        named = ((RECORD_COLUMNS, self.records), (IMAGE_COLUMNS, self.images))
        texts = {
            column: array
            for names, each in named
            if each
            for column, array in zip(names, (each.characters, each.offsets), strict=True)
        }
        prompts = np.zeros(len(self), np.uint64) if self.prompts is None else self.prompts
        of_rows = {"offsets": self.offsets, "prompts": prompts, "trained": self.labels_per_row}
        of_rows |= {} if self.places is None else {"places": self.places}
        return {"ids": self.ids, "labels": self.labels, **of_rows, **packs, **values, **weights, **texts}


def answer_start(labels: Sequence[int] | np.ndarray) -> int:
    """The position of the first label; the number of tokens if there is none."""
    trained = np.flatnonzero(np.asarray(labels) != IGNORED)
    return int(trained[0]) if len(trained) else len(labels)


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Best-fit decreasing bin packing: longest rows first, each into the fullest pack with enough room. Deterministic.

    O(n log n); no length may exceed ``capacity``. See Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    packs: list[list[int]] = []
    packs_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # free slots → packs
    open_spaces = 0  # bit s is set if some pack has s free slots
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the tightest fit
            number = packs_by_space[space].pop()
            if not packs_by_space[space]:
                open_spaces ^= 1 << space
        else:
            space, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        packs_by_space[space - length].append(number)
        open_spaces |= 1 << (space - length)
    rows = np.array([row for members in packs for row in members], dtype=np.int64)
    return Packs(rows, np.cumsum([0, *map(len, packs)], dtype=np.int64))


PACKED_TOGETHER = 100_000
"""Units among which ``pack_units`` looks for those that fill a pack; more would need more memory and fill no better."""


def pack_units(lengths: np.ndarray, unit: int, capacity: int, folder: Path | None = None, name: str = "") -> Packs:
    """Like ``pack``, for rows whose units of ``unit`` consecutive rows stay together; in files of a folder."""

    def packed() -> Iterator[Packs]:
        for part in blocks(len(lengths), PACKED_TOGETHER * unit):
            block = pack(lengths[part].reshape(-1, unit).sum(axis=1, dtype=np.int64), capacity)
            rows = block.rows[:, None] * unit + np.arange(unit)  # (units, unit)
            yield Packs(rows.reshape(-1) + part.start, block.offsets * unit)

    return Packs.chained(packed(), folder, name)


def pack_in_order(lengths: np.ndarray, places: np.ndarray, unit: int, capacity: int) -> Packs:
    """Fill one pack after the other with the rows in the order of their ``places``: fuller packs would mix them.

    Rows and ``places``: (rows,); units of ``unit`` consecutive rows stay together.
    """
    sizes = np.add.reduceat(lengths, np.arange(0, len(lengths), unit))
    order = np.argsort(places[::unit], kind="stable")
    starts, room = [0], capacity
    for number, size in enumerate(sizes[order].tolist()):
        if size > room:
            starts.append(number)
            room = capacity
        room -= size
    rows = order[:, None] * unit + np.arange(unit)  # (units, unit)
    return Packs(rows.reshape(-1), np.array([*starts, len(order)]) * unit)


def one_by_one(count: int, unit: int = 1, folder: Path | None = None, name: str = "") -> Packs:
    """Put each row, or each unit of ``unit`` consecutive rows, into a pack of its own; in files of a folder."""
    parts = blocks(count, PACKED_TOGETHER * unit)
    packs = (Packs(np.arange(p.start, p.stop), np.arange(0, p.stop - p.start + 1, unit)) for p in parts)
    return Packs.chained(packs, folder, name)
