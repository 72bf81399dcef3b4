"""Batches: each document once an epoch, whatever the ranks, packing and length."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fixtures.documents import batches, documents, own_cache, same, seen_in

from runner.data.batches import PADDED_TO
from runner.data.examples import Answers
from runner.data.packing import IGNORED, Rows

# --- packing and batches


@pytest.mark.parametrize("packing", [True, False])
def test_one_pass_has_each_document_once_and_no_label_across_documents(packing):
    rows = documents()
    seen: Counter[int] = Counter()
    for batch in batches(rows, packing=packing, max_length=40).one_pass():
        ids, labels, positions = (batch[key].numpy() for key in ("input_ids", "labels", "position_ids"))
        assert (ids[labels != IGNORED] // 100 == labels[labels != IGNORED] // 100).all()  # of the same document,
        assert (ids[labels != IGNORED] + 1 == labels[labels != IGNORED]).all()  # and the next token of it
        assert (positions[ids > 0] == ids[ids > 0] % 100).all()  # positions count from 0 in each document
        seen.update(ids[ids > 0].tolist())
        assert batch["tokens"] == (ids > 0).sum()
        assert batch["trained"] == (labels != IGNORED).sum()
        if packing:
            assert ids.shape == (3, 40)
        else:
            assert ids.shape[1] % 8 == 0
        assert (positions[ids == 0] == 0).all()  # or padding would look like a long document
    assert seen == Counter(rows.ids.tolist())


def test_rows_laid_end_to_end_are_the_same_rows_without_padding():
    padded = batches(documents(), packing=False, max_length=40)
    flat = padded.laid_end_to_end()
    for before, after in zip(padded.one_pass(), flat.one_pass(), strict=True):
        assert after["input_ids"].shape[0] == 1
        assert after["input_ids"].shape[1] - after["tokens"] < PADDED_TO
        assert [before[key] for key in ("tokens", "trained")] == [after[key] for key in ("tokens", "trained")]
        kept = [batch["labels"].flatten()[batch["trained_at"]].tolist() for batch in (before, after)]
        assert kept[0] == kept[1]
    assert padded.efficiency < 0.9 < flat.efficiency
    packed = batches(documents(), packing=True)
    assert packed.laid_end_to_end().step(0)[0]["input_ids"].shape == packed.step(0)[0]["input_ids"].shape


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_depends_on_seed_and_number_alone(packing):
    one, other = (batches(documents(), packing=packing, max_length=40) for _ in range(2))
    for step in (5, 0, 17, 5):
        assert same(one.step(step), other.step(step))
    assert not same(one.step(0), one.step(1))
    assert not same(one.step(0), batches(documents(), packing=packing, max_length=40, seed=8).step(0))


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_what_one_would_see(packing):
    rows = documents()
    alone = batches(rows, packing=packing, rows_per_batch=4, max_length=40, epochs=1)
    ranks = [batches(rows, packing=packing, rows_per_batch=2, max_length=40, epochs=1, rank=r, world=2) for r in (0, 1)]
    assert alone.order.steps() == ranks[0].order.steps()
    for step in range(alone.order.steps()):
        mine, yours = (rank.step(step) for rank in ranks)
        assert len(mine) == len(yours)  # or one rank would wait for the other for ever
        assert seen_in([mine]) + seen_in([yours]) == seen_in([alone.step(step)])


def test_a_rank_without_rows_gets_padding():
    rows = documents(count=3)
    last = batches(rows, packing=False, rows_per_batch=1, rank=1, world=2, epochs=1, accumulation=1, max_length=40)
    [batch] = last.step(1)
    assert (batch["tokens"], batch["trained"]) == (0, 0)
    assert batch["labels"].eq(IGNORED).all()


@pytest.mark.parametrize("packing", [True, False])
def test_efficiency_is_useful_tokens_for_each_slot(packing):
    made = batches(documents(), packing=packing, max_length=40, rows_per_batch=1)
    passed = list(made.one_pass())
    slots = sum(batch["input_ids"].numel() for batch in passed)
    assert made.efficiency == pytest.approx(sum(batch["tokens"] for batch in passed) / slots)


def test_the_heaviest_batch_of_prompts_has_the_longest_one_though_rows_before_it_are_left_out():
    """Packs are numbered without the rows whose prompt is held out elsewhere."""
    lengths = (3, 4, 9)
    rows = Rows.of([(np.full(length, length, np.int32), np.full(length, IGNORED, np.int32)) for length in lengths])
    rows = replace(rows, packs=rows.packs.without(np.array([True, False, False])))
    made = batches(rows, packing=False, rows_per_batch=1, accumulation=1, answers=Answers(2, most_tokens=5))
    heaviest = made.heaviest()
    assert heaviest["tokens"] == 2 * (9 + 5)
    assert heaviest["trained"] == 2 * 5
    assert heaviest["input_ids"].numel() <= made.largest.tokens
