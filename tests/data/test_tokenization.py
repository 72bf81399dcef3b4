"""From rows to tokens: nothing lost, nothing doubled, nothing leaked."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from fixtures.chat_tokenizer import build
from fixtures.documents import LENGTH, SETTINGS, batches, load, own_cache, source, talk

from runner.config import schema
from runner.data import chat_template, dataset, formats
from runner.errors import DataError
from runner.tasks import pretrain
from runner.tasks import task as tasks


def test_rows_become_the_tokens_of_the_chat_template():
    splits = load(map(talk, range(40)))
    assert len(splits.train) + len(splits.eval) == 40
    expected = {
        tuple(chat_template.encode(talk(number)["messages"], build("llama3"), "assistant")["input_ids"])
        for number in range(40)
    }
    assert {tuple(rows[i][0].tolist()) for rows in (splits.train, splits.eval) for i in range(len(rows))} == expected


def test_the_report_counts_what_became_of_the_rows():
    rows = [*map(talk, range(30)), talk(3), talk(3), talk(99, words=60)]
    report = load(rows, eval_fraction=0.2).report
    assert (report.rows_read, report.duplicates, report.truncated, report.dropped) == (33, 2, 1, 0)
    assert report.train_rows + report.eval_rows == 31
    assert report.longest > LENGTH
    dropped = load(rows, eval_fraction=0.2, overlong="drop").report
    assert (dropped.truncated, dropped.dropped) == (0, 1)
    assert dropped.longest == report.longest
    assert dropped.train_rows + dropped.eval_rows == 30
    assert load(rows, deduplicate=False).report.duplicates == 0
    assert json.loads(json.dumps(vars(report))) == vars(report)


def test_the_report_names_the_limits_that_truncate_none_or_few():
    rows = [talk(number, words=words) for number, words in enumerate(range(1, 41))]
    report = load(rows).report
    assert load(rows, max_length=report.longest).report.truncated == 0
    assert load(rows, max_length=report.longest - 1).report.truncated == 1
    assert load(rows, max_length=report.longest_of_95_percent).report.truncated == 2  # 5 % of 40
    assert load(rows, max_length=report.longest_of_95_percent - 1).report.truncated == 3
    assert load(rows, overlong="drop").report.longest_of_95_percent == report.longest_of_95_percent


def test_rows_that_differ_only_in_their_weights_are_no_duplicates():
    masked, alike = talk(1), talk(1)
    masked["messages"][1] = {**masked["messages"][1], "weight": 0}
    alike["messages"][1] = {**alike["messages"][1], "weight": 1}
    splits = load([talk(1), masked, alike, *map(talk, range(2, 20))])
    assert (splits.report.duplicates, splits.report.masked_out) == (1, 1)


def test_the_reference_of_a_sample_is_an_answer_that_is_trained():
    def row(number: int) -> dict:
        first, second = talk(number)["messages"], talk(number + 100)["messages"]
        return {"messages": [first[0], {**first[1], "train": False}, *second]}

    splits = load(map(row, range(30)))
    assert splits.samples
    for sample in splits.samples:
        assert sample["reference"].startswith("answer 1")
        assert "answer" in sample["prompt"]


def test_trained_tokens_are_those_that_batches_train():
    splits = load(map(talk, range(30)))
    passed = list(batches(splits.train, max_length=LENGTH).one_pass())
    assert splits.report.train_trained_tokens == sum(batch["trained"] for batch in passed)
    assert splits.report.train_tokens == sum(batch["tokens"] for batch in passed)
    everything = load(map(talk, range(30)), train_on="all").report
    assert everything.train_trained_tokens == everything.train_tokens - everything.train_rows  # none predicts the first


def test_a_text_becomes_several_rows():
    rows = [{"text": f"{number} " + "and so on, " * 40} for number in range(8)]
    task = pretrain.pretrain(append_eos=True)
    settings = schema.DataSettings(**{**SETTINGS, "eval_fraction": 0.4})
    read = functools.partial(formats.text, key="text")
    splits = dataset.load(lambda: source(rows), read, task, build(None), settings, {"format": {}, "task": {}})
    assert splits.report.train_rows > splits.report.rows_read
    assert splits.report.truncated == 0


def test_faulty_rows_are_named_by_file_and_line():
    empty = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    with pytest.raises(DataError) as caught:
        load([talk(1), empty, talk(2), {"messages": [{"role": "user", "content": "Hi"}]}])
    assert "rows.jsonl:2: message 2, of the assistant, is empty" in str(caught.value)
    assert "rows.jsonl:4: has no assistant turn" in str(caught.value)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*looks like text") as caught:
        load([{"text": "no conversation"}] * 9)
    assert len(caught.value.faults) == 1  # all rows have it: said once


def test_a_row_that_the_task_refuses_is_named():
    with pytest.raises(DataError, match=r"rows\.jsonl:[12]: gives conversations, but this task needs plain text"):
        load([talk(1), talk(2)], task=pretrain.pretrain(append_eos=True))


def test_nothing_to_train_on():
    long_question = [talk(number, question=f"{number} " + "why " * 300) for number in range(9)]
    with pytest.raises(DataError, match=r"none of the .* training rows has a label: all tokens are masked") as caught:
        load(long_question)
    assert f"were truncated to data.max_length={LENGTH}" in str(caught.value)
    assert "increase data.max_length" in str(caught.value)
    with pytest.raises(DataError, match=rf"data\.max_length={LENGTH}: every training row is longer than this limit"):
        load(long_question, overlong="drop")
    with pytest.raises(DataError, match=r"data: there are no training rows \(22 rows read, 0 duplicates, 10 leaked\)"):
        load(map(talk, range(10)), held_out=map(talk, range(12)))


def test_nothing_to_evaluate_on():
    with pytest.raises(DataError, match=r"data\.eval_fraction=0: selects no rows for evaluation") as caught:
        load(map(talk, range(10)), eval_fraction=0)
    assert "raise data.eval_fraction" in str(caught.value)


def test_masked_rows_are_left_out_and_counted():
    masked = talk(50, question="why " * 300)
    report = load([*map(talk, range(30)), masked]).report
    assert (report.masked_out, report.truncated) == (1, 1)
    assert report.train_rows + report.eval_rows == 30
