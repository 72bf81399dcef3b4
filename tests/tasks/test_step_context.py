"""What a task sees before a step: the rows of the step, of this rank, and batches of documents of its own."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from fixtures.documents import batches, documents

from runner.data.packing import Rows
from runner.tasks.step_context import StepContext

ROWS = documents()


def context(**ranks: int) -> StepContext:
    given = batches(ROWS, **ranks)
    return StepContext(
        model=None, tokenizer=None, batches=given, packs=given.order.packs_of_step(0), micro_batches=given.step(0),
        seed=0, trains=True, start=contextlib.nullcontext, on_device=lambda batch: {**batch, "moved": True}, show=print,
        agree=lambda *numbers: list(numbers),
    )  # fmt: skip


def numbers(batch: Any) -> set[int]:
    """The rows of a batch, which ``documents`` writes into their tokens."""
    return {int(token) // 100 - 1 for token in batch["input_ids"].flatten() if token}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rows_of_a_rank_are_those_of_its_micro_batches(rank: int) -> None:
    step = context(rank=rank, world=2)
    assert [set(rows) for rows in step.rows] == [numbers(batch) for batch in step.micro_batches]
    other = context(rank=1 - rank, world=2)
    assert step.order == other.order
    assert sorted(row for each in (step, other) for rows in each.rows for row in rows) == sorted(step.order)


def test_a_batch_of_new_documents_is_on_the_device_and_has_their_numbers() -> None:
    new = [(np.array([5, 6, 7]), np.array([-100, 6, 7])), (np.array([8, 9]), np.array([-100, 9]))]
    batch = context().batch(new, reward=[0.5, 2.0])
    assert batch["moved"]
    assert [token for token in batch["input_ids"].flatten().tolist() if token] == [5, 6, 7, 8, 9]
    assert batch["reward"].tolist() == [0.5, 2.0]
    assert batch["trained"] == 3
    assert set(Rows.of(new).lengths) == {2, 3}
