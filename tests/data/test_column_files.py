"""Columns of numbers that grow, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.data import column_files
from runner.data.column_files import Column, aside, blocks, index_type, is_among, running_total, stored


@pytest.mark.parametrize("code", ["i", "f", "B"])
def test_a_column_in_a_file_is_a_column_in_memory(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_files, "AT_ONCE", 5)
    made = [Column(code), Column(code, tmp_path / "column.npy")]
    for column in made:
        for number in range(23):
            column.extend([number, number + 1])
        column.extend_array(np.arange(9, dtype=column_files.DTYPES[code]))
        column.append(7)
        assert len(column) == 56
    first, second = (column.finish() for column in made)
    assert (first.dtype, first.tolist()) == (second.dtype, second.tolist())
    assert isinstance(second, np.memmap)
    assert np.load(tmp_path / "column.npy").tolist() == first.tolist()


def test_an_empty_column_is_no_file_to_map(tmp_path: Path) -> None:
    assert Column("f", tmp_path / "column.npy").finish().tolist() == []


def test_a_column_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(part.start, part.stop) for part in blocks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert not list(blocks(0))
    monkeypatch.setattr(column_files, "BLOCK", 4)
    assert [part.stop for part in blocks(9)] == [4, 8, 9]


@pytest.mark.parametrize("count", [0, 1, 8, 30])
def test_totals_and_members_are_those_of_numpy(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_files, "BLOCK", 8)
    draw = np.random.default_rng(count)
    lengths = draw.integers(0, 50, count).astype(np.int32)
    ends = stored(running_total(lengths), "q", tmp_path / "ends.npy")
    assert ends.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert ends.dtype == np.int64
    values = draw.integers(0, 20, count, dtype=np.uint64)
    for others in (values[:0], np.array([3, 5, 19, 2**64 - 1], dtype=np.uint64)):
        assert is_among(values, others).tolist() == np.isin(values, others).tolist()


def test_small_numbers_need_four_bytes(tmp_path: Path) -> None:
    assert (index_type(2**31 - 1), index_type(2**31)) == (np.int32, np.int64)
    assert (aside(None), aside(tmp_path)) == (None, tmp_path / "aside")
