"""Which rows are held out."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from fixtures.documents import load, own_cache, talk, texts

from runner.data import column_files, splits, tokenization
from runner.data.splits import Index
from runner.errors import DataError


def test_the_same_prompt_is_never_on_both_sides():
    rows = [talk(number, question=f"Question  {number % 17}?".upper() if number % 2 else None) for number in range(200)]
    splits = load(rows)
    said = [[text.split("<|end_header_id|>\n\n")[1] for text in texts(found)] for found in (splits.train, splits.eval)]
    normal = [{" ".join(question.split()).casefold() for question in questions} for questions in said]
    assert normal[0]
    assert normal[1]
    assert not normal[0] & normal[1]


def test_the_side_of_a_prompt_does_not_depend_on_the_other_rows():
    few, many = load(map(talk, range(60))), load(map(talk, range(120)))
    assert set(texts(few.eval)) <= set(texts(many.eval))
    assert set(texts(few.train)) <= set(texts(many.train))


def test_rows_to_evaluate_on_that_also_train_are_left_out_of_training():
    splits = load(map(talk, range(20)), held_out=map(talk, range(15, 25)))
    assert splits.report.leaked == 5
    assert (len(splits.train), len(splits.eval)) == (15, 10)


def test_limits_take_samples_that_larger_ones_contain():
    small = load(map(talk, range(100)), train_rows=10, eval_rows=3)
    large = load(map(talk, range(100)), train_rows=40, eval_rows=6)
    assert (len(small.train), len(small.eval), len(large.train), len(large.eval)) == (10, 3, 40, 6)
    assert set(texts(small.train)) < set(texts(large.train))
    assert set(texts(small.eval)) < set(texts(large.eval))


def test_little_data_still_has_both_sides():
    splits = load([talk(1), talk(2)], eval_fraction=0.01)
    assert (len(splits.train), len(splits.eval)) == (1, 1)


def test_samples_are_held_out_prompts_with_what_followed():
    splits = load(map(talk, range(100)))
    assert len(splits.samples) == tokenization.SAMPLES
    sample = splits.samples[0]
    assert sample["prompt"].endswith("assistant<|end_header_id|>\n\n")
    assert any(sample["prompt"] + sample["reference"] in text for text in texts(splits.eval))


def test_a_format_leaves_rows_out_with_none():
    records, counts = [(f"row {number}", {"text": f"text {number}"}) for number in range(6)], Counter[str]()
    kept = splits.index(records, lambda row: row["text"] if row["text"] > "text 2" else None, False, counts)
    assert [item.number for item in splits.items(kept, lambda row: row["text"])] == [3, 4, 5]
    assert counts == {"rows_read": 6, "left_out": 3}
    with pytest.raises(DataError, match="row 3: gave None for a row that it kept before"):
        list(splits.items(kept, lambda _: None))
    with pytest.raises(DataError, match="gave None for every row"):
        splits.index(records, lambda _: None, False, Counter())
    assert len(splits.index([], lambda _: None, False, counts)) == 0, "of another split, which is empty"


def index(keys: np.ndarray, prompts: np.ndarray) -> Index:
    numbers = np.arange(len(keys))
    columns = {"numbers": numbers, "keys": keys, "prompts": prompts, "places": 0 * numbers}
    return Index([], columns, np.ones(len(keys), dtype=bool))


def hashes(seed: int, count: int, different: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.choice(draw.integers(0, 2**64, different, dtype=np.uint64), count)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_files, "BLOCK", 32)
    monkeypatch.setattr(column_files, "AT_ONCE", 50)


@pytest.mark.parametrize(("count", "different"), [(0, 1), (1, 1), (40, 3), (700, 200), (700, 10**6)])
def test_duplicates_are_found_as_in_one_piece(count: int, different: int, small_blocks: None) -> None:
    keys = hashes(count, count, different)
    expected = np.zeros(count, dtype=bool)
    expected[np.unique(keys, return_index=True)[1]] = True
    assert splits.first_of_each(keys).tolist() == expected.tolist()


@pytest.mark.parametrize("count", [1, 5, 299, 300, 999])
def test_a_sample_has_the_lowest_hashes(count: int, small_blocks: None) -> None:
    for different in (3, 400):
        examples = index(hashes(7, 600, different), hashes(8, 600, 50)).of(slice(0, 600, 2))
        lowest = np.sort(np.argsort(examples.columns["keys"][::2], kind="stable")[:count]) * 2
        assert np.flatnonzero(splits.limit(examples, count).kept).tolist() == lowest.tolist()


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.3, 1 - 1e-9])
def test_held_out_prompts_are_those_with_the_lowest_hashes(fraction: float, small_blocks: None) -> None:
    examples = index(hashes(1, 300, 300), hashes(2, 300, 40))
    train, held_out = splits.split_by_prompt(examples, fraction)
    prompts = np.unique(examples.prompts)
    below = int((prompts < fraction * 2.0**64).sum())
    below = 1 if fraction and below in (0, len(prompts)) else below
    assert np.unique(held_out.prompts).tolist() == prompts[:below].tolist()
    assert np.unique(train.prompts).tolist() == prompts[below:].tolist()
    assert len(train) + len(held_out) == 300
    alone = index(hashes(1, 9, 9), hashes(2, 9, 1))
    assert [len(side) for side in splits.split_by_prompt(alone, 1e-9)] == [9, 0], "one prompt is not split"
    nothing = index(hashes(1, 0, 1), hashes(2, 0, 1))
    assert [len(side) for side in splits.split_by_prompt(nothing, 0.5)] == [0, 0]
