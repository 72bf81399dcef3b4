"""Columns of numbers that grow, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.data import column_files
from runner.data.column_files import Column


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
