"""The cache of a teacher's tokens: what is known, what is lost with a damaged file, and what its key depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runner.data.packing import Rows
from runner.models.quantization import none
from runner.models.sources import ModelSource
from runner.tasks import task, teacher_logits
from runner.train import teacher_cache
from runner.train.teacher import Teacher
from runner.train.teacher_cache import Store

K = 2
ROWS = Rows.of([(np.arange(3, 3 + length), np.arange(3, 3 + length)) for length in (4, 3, 5)])


def tokens(row: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities), each (labels, k), of a row."""
    count = int(np.diff(ROWS.label_offsets)[row])
    return np.full((count, K), 10 * row, np.int32), np.full((count, K), -0.5 * row, np.float32)


def test_rows_are_known_once_they_are_noted(tmp_path: Path) -> None:
    """Two processes write to the same columns."""
    one, other = (Store(tmp_path / "tokens", ROWS, K, []) for _ in range(2))
    one.write([1], *tokens(1))
    assert one.known().tolist() == [False, False, False], "not on the disk yet"
    other.write([2, 0], *(np.concatenate(pair) for pair in zip(tokens(2), tokens(0), strict=True)))
    one.note()
    assert other.known().tolist() == [False, True, False]
    other.note()
    assert one.known().tolist() == [True, True, True]
    ids, values = (one.columns()[name] for name in (teacher_logits.IDS, teacher_logits.LOG_PROBABILITIES))
    for row in range(3):
        cut = slice(*ROWS.label_offsets[row : row + 2])
        assert (ids[cut] == tokens(row)[0]).all()
        assert (values[cut] == tokens(row)[1]).all()


@pytest.mark.parametrize("name", [*teacher_cache.DTYPES, "known"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "tokens", ROWS, K, [])
    store.write([0, 1, 2], *(np.concatenate(parts) for parts in zip(*map(tokens, range(3)), strict=True)))
    store.note()
    assert store.known().all()
    (tmp_path / f"tokens.{name}.npy").write_bytes(b"damaged")
    assert not store.known().any()
    store.write([1], *tokens(1))
    store.note()
    assert store.known().tolist() == [False, True, False]


def test_the_key_is_that_of_the_probabilities() -> None:
    source = ModelSource("some/model", "0" * 40, "float32", "eager", False, "model")
    spec = task.Teacher(where="some/model", quant="none", top_k=4)
    teacher = Teacher(spec, source, None, none.none(), 259)
    cpu = torch.device("cpu")
    known = teacher_cache.key_of(teacher, cpu)
    assert teacher_cache.key_of(replace(teacher, source=replace(source, name="other")), cpu) == known
    for changes in ({"spec": replace(spec, top_k=5)}, {"size": 258}, {"source": replace(source, revision="1" * 40)},
                    {"spec": replace(spec, quant="4bit")}):  # fmt: skip
        assert teacher_cache.key_of(replace(teacher, **changes), cpu) != known, changes
