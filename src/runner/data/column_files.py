"""Columns of numbers: they grow in .npy files and are read in blocks, so that data of any size need little memory."""

from __future__ import annotations

import array
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

AT_ONCE = 2**18
"""Numbers that are kept in memory before they are written."""
BLOCK = 2**16
"""Numbers of a column that are read at once."""
ASIDE = "aside"
"""The folder, inside of that of a cache entry, of columns that the entry does not keep."""
DTYPES = {"i": np.int32, "q": np.int64, "Q": np.uint64, "f": np.float32, "B": np.uint8}
"""Type code of ``array.array`` → dtype."""


class Column:
    """Numbers of one type, appended one after the other."""

    def __init__(self, code: str, path: Path | None = None) -> None:
        """``path``: the .npy file; None: in memory."""
        self.code, self.path, self._buffer = code, path, array.array(code)
        self._written = 0
        self._file: IO[bytes] | None = None
        if path is not None:
            self._file = path.open("wb")
            self._write_header()

    def __len__(self) -> int:
        return self._written + len(self._buffer)

    def extend(self, numbers: Iterable[Any]) -> None:
        self._buffer.extend(numbers)
        if self._file is not None and len(self._buffer) >= AT_ONCE:
            self._flush()

    def append(self, number: float) -> None:
        self.extend((number,))

    def extend_array(self, numbers: np.ndarray) -> None:
        """Append an array of the dtype of this column."""
        if self._file is None:
            self._buffer.frombytes(numbers.tobytes())
            return
        self._flush()
        numbers.tofile(self._file)
        self._written += len(numbers)

    def finish(self) -> np.ndarray:
        """All numbers; those of a file are memory-mapped."""
        if self._file is None or self.path is None:
            return np.frombuffer(self._buffer, dtype=DTYPES[self.code])
        self._flush()
        self._file.seek(0)
        self._write_header()  # of the same length: numpy leaves space for the number of a growing axis
        self._file.flush()
        if self.path.parent.name != ASIDE:
            os.fsync(self._file.fileno())
        self._file.close()
        return np.load(self.path, mmap_mode="r") if self._written else np.array([], dtype=DTYPES[self.code])

    def _flush(self) -> None:
        assert self._file is not None
        self._buffer.tofile(self._file)
        self._written += len(self._buffer)
        self._buffer = array.array(self.code)

    def _write_header(self) -> None:
        assert self._file is not None
        description = np.lib.format.dtype_to_descr(np.dtype(DTYPES[self.code]))
        header = {"descr": description, "fortran_order": False, "shape": (self._written,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def open_columns(codes: Mapping[str, str], folder: Path | None, prefix: str) -> dict[str, Column]:
    """Columns by name, in the files ``<prefix>.<name>.npy`` of ``folder``; without a folder in memory."""
    paths = {name: folder / f"{prefix}.{name}.npy" if folder is not None else None for name in codes}
    return {name: Column(code, paths[name]) for name, code in codes.items()}


def aside(folder: Path | None) -> Path | None:
    """The folder of the columns that are not kept; None without a folder: such columns stay in memory."""
    if folder is None:
        return None
    (folder / ASIDE).mkdir(exist_ok=True)
    return folder / ASIDE


def stored(parts: Iterable[np.ndarray], code: str, path: Path | None) -> np.ndarray:
    """A column of these arrays one behind the other; ``path``: its file, None: in memory."""
    column = Column(code, path)
    for part in parts:
        column.extend_array(part)
    return column.finish()


def blocks(count: int, size: int | None = None) -> Iterator[slice]:
    """The slices of a column of ``count`` numbers, in its order: ``size`` numbers each, by default ``BLOCK``."""
    size = size or BLOCK
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def index_type(count: int) -> type[np.signedinteger[Any]]:
    """The smallest usual type of numbers up to ``count``."""
    return np.int32 if count < 2**31 else np.int64


def running_total(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Where each part of a column begins and the last one ends, (parts + 1,) int64, block by block."""
    total = 0
    yield np.zeros(1, dtype=np.int64)
    for part in blocks(len(counts)):
        ends = np.cumsum(counts[part], dtype=np.int64) + total
        total = int(ends[-1])
        yield ends


def is_among(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each value, (values,), is one of the ``others``, which ascend: ``numpy.isin`` with little memory."""
    found = np.zeros(len(values), dtype=bool)
    for part in blocks(len(values) if len(others) else 0):
        places = np.searchsorted(others, values[part])
        found[part] = others[np.minimum(places, len(others) - 1)] == values[part]
    return found
