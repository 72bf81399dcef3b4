"""A teacher's logits at the trained positions, from the model in memory and from its most likely tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fixtures.language_models import FAMILIES, build

from runner.data.batches import Batches
from runner.data.packing import Rows
from runner.tasks import teacher_logits

SIZE = 60
"""Of the 64 tokens of the teacher, those that its student has, too."""


@pytest.fixture(scope="module")
def teacher() -> Any:
    return build(FAMILIES["llama"], "eager").eval()


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    made = []
    for length in (7, 4, 9):
        ids = generator.integers(3, SIZE, length)
        made.append((ids, np.where(np.arange(length) < 2, -100, ids)))
    return made


def batch() -> Any:
    rows = Rows.of(documents())
    shape = {"max_length": 16, "rows_per_batch": 3, "accumulation": 1, "seed": 0, "shuffle": False, "pad_id": 0}
    return Batches(rows, packing=False, **shape).step(0)[0]


@torch.no_grad()
def whole(teacher: Any) -> torch.Tensor:
    """Its logits at the trained positions, one document at a time, (trained, V)."""
    return torch.cat([
        teacher(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1][torch.from_numpy(labels[1:] != -100)]
        for ids, labels in documents()
    ])  # fmt: skip


def test_a_teacher_in_memory_gives_its_logits_and_is_no_part_of_the_model(teacher: Any) -> None:
    student = build(FAMILIES["llama"])
    names = set(student.state_dict())
    teacher_logits.attach(student, teacher)
    assert set(student.state_dict()) == names
    assert all(module is not teacher for module in student.modules())
    expected = whole(teacher)
    numbers = torch.tensor([3, 0, 11])
    found = teacher_logits.logits(student, batch())(numbers, SIZE)
    torch.testing.assert_close(found, expected[numbers, :SIZE], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1024, 5])
def test_the_most_likely_tokens_of_the_common_vocabulary(
    teacher: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_logits, "AT_ONCE", at_once)
    given = batch()
    ids, values = teacher_logits.top(teacher, given, 4, SIZE)
    best = whole(teacher)[:, :SIZE].topk(4, -1)
    assert (ids.dtype, ids.shape) == (torch.int32, (given["trained"], 4))
    assert torch.equal(ids.long(), best.indices)
    torch.testing.assert_close(values, best.values.log_softmax(-1), atol=1e-5, rtol=1e-4)
    kept = {**given, teacher_logits.IDS: ids, teacher_logits.LOG_PROBABILITIES: values}
    found = teacher_logits.logits(None, kept)(torch.arange(given["trained"]), SIZE)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(given["trained"]))
    assert ((found > -torch.inf).sum(-1) == 4).all()
