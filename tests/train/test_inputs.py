"""What a run knows before its weights are loaded: steps, micro-batches, and the rows of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, composed

from runner.data.batches import Batches
from runner.train import inputs
from runner.train.inputs import Inputs
from runner.train.options import Options


@pytest.fixture(scope="module")
def made(cache: Path) -> Inputs:
    words = ("train.max_steps=3", "train.per_device_batch_size=4", "train.gradient_accumulation_steps=2")
    return inputs.inputs(Options(composed(*TINY, *words)))


def rows(batches: Batches, step: int = 0) -> list[int]:
    """The rows that this rank computes in a step."""
    return [row for packs in batches.parts(batches.order.packs_of_step(step)) for row in batches.rows_in(packs)]


def test_smaller_micro_batches_have_the_rows_of_the_step(made: Inputs) -> None:
    smaller = inputs.compute_at_once(made, 2)
    assert (made.total_steps, smaller.total_steps) == (3, 3)
    assert (made.cut, smaller.cut) == ("", ", 2 of 4 rows at a time")
    assert (len(made.batches.step(0)), len(smaller.batches.step(0))) == (2, 4)
    assert rows(smaller.batches) == rows(made.batches)
    assert (smaller.settings.rows_at_a_time, made.settings.rows_at_a_time) == (2, 4)
    assert smaller.evaluation.batches_in_pass >= made.evaluation.batches_in_pass


def test_two_ranks_share_the_rows_of_a_step(made: Inputs) -> None:
    shares = [inputs.load_data(made.options, made.source, made.tokenizer, rank, 2) for rank in (0, 1)]
    (splits, one, of_one), (_, other, of_other) = shares
    assert not {*rows(one)} & {*rows(other)}
    assert len(one.step(0)) == len(other.step(0)) == 2
    assert {*of_one.pass_packs} | {*of_other.pass_packs} == {*made.evaluation.pass_packs}
    assert splits.digest == made.splits.digest
