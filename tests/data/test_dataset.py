"""From rows to batches: nothing lost, nothing doubled, nothing leaked, and the same again from the cache."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from fixtures.chat_tokenizer import build
from hydra import compose, initialize_config_dir

from runner.config import bind, schema
from runner.data import chat_template, dataset, formats, sources
from runner.data.batches import PADDED_TO, Batches
from runner.data.packing import IGNORED, Rows, one_by_one, pack
from runner.errors import ConfigError, DataError
from runner.tasks import pretrain, sft
from runner.tasks import task as tasks

LENGTH = 96
SETTINGS = {
    "max_length": LENGTH, "packing": True, "overlong": "truncate", "deduplicate": True,
    "eval_fraction": 0.25, "eval_rows": None, "train_rows": None,
}  # fmt: skip
read_messages = functools.partial(formats.messages, messages="messages", role="role", content="content")


def talk(number: int, question: str | None = None, words: int = 3) -> dict:
    answer = " ".join(f"answer {number}" for _ in range(words))
    asked = question or f"question {number}?"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def source(rows: Iterable[dict], held_out: Iterable[dict] | None = None) -> sources.Source:
    def records(found: Iterable[dict]) -> sources.Records:
        placed = [(sources.Place("rows.jsonl", number), row) for number, row in enumerate(found, start=1)]
        return sources.Records(lambda: placed)

    rows, held_out = list(rows), None if held_out is None else list(held_out)
    return sources.Source("rows", records(rows), held_out and records(held_out), json.dumps([rows, held_out]), "")


def load(
    rows: Iterable[dict],
    held_out: Iterable[dict] | None = None,
    task: tasks.Task | None = None,
    train_on: str = "assistant",
    **changes: object,
) -> dataset.Splits:
    task = task or sft.sft(train_on=train_on)
    settings = schema.DataSettings(**{**SETTINGS, **changes})
    identity = {"format": {"_target_": "messages"}, "task": {"name": task.name, "train_on": train_on}}
    return dataset.load(lambda: source(rows, held_out), read_messages, task, build("llama3"), settings, identity)


def texts(rows: Rows) -> list[str]:
    return [build("llama3").decode(rows[number][0]) for number in range(len(rows))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def test_trained_tokens_are_those_that_batches_train():
    splits = load(map(talk, range(30)))
    passed = list(batches(splits.train, max_length=LENGTH).one_pass())
    assert splits.report.train_trained_tokens == sum(batch["trained"] for batch in passed)
    assert splits.report.train_tokens == sum(batch["tokens"] for batch in passed)
    everything = load(map(talk, range(30)), train_on="all").report
    assert everything.train_trained_tokens == everything.train_tokens - everything.train_rows  # none predicts the first


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
    assert len(splits.samples) == dataset.SAMPLES
    sample = splits.samples[0]
    assert sample["prompt"].endswith("assistant<|end_header_id|>\n\n")
    assert any(sample["prompt"] + sample["reference"] in text for text in texts(splits.eval))


def test_a_text_becomes_several_rows():
    rows = [{"text": f"{number} " + "and so on, " * 40} for number in range(8)]
    task = pretrain.pretrain(append_eos=True)
    settings = schema.DataSettings(**{**SETTINGS, "eval_fraction": 0.4})
    read = functools.partial(formats.text, key="text")
    splits = dataset.load(lambda: source(rows), read, task, build(None), settings, {"format": {}, "task": {}})
    assert splits.report.train_rows > splits.report.rows_read
    assert splits.report.truncated == 0


# --- bad input


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
    with pytest.raises(DataError, match=r"rows\.jsonl:[12]: gives conversations"):
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


def test_a_full_disk_leaves_nothing_half_written(own_cache, monkeypatch):
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(DataError, match="cannot be written: No space left on device") as caught:
        load(map(talk, range(9)))
    assert "RUNNER_CACHE" in str(caught.value)
    assert [path.suffix for path in (own_cache / "data").iterdir()] == [".lock"]


# --- the cache


def counting(task: tasks.Task, calls: Counter) -> tasks.Task:
    def encode(*arguments: object) -> list:
        calls["encode"] += 1
        return task.encode(*arguments)

    return tasks.Task(task.name, task.packable, encode, task.prompt, task.loss, task.metrics)


def test_the_cache_is_hit_by_the_same_and_by_nothing_else():
    calls: Counter = Counter()
    task = counting(sft.sft(train_on="assistant"), calls)
    first = load(map(talk, range(20)), task=task)
    assert calls["encode"] == 20
    second = load(map(talk, range(20)), task=task)
    assert calls["encode"] == 20
    assert isinstance(second.train.ids, np.memmap)
    assert (texts(first.train), first.report, first.samples) == (texts(second.train), second.report, second.samples)
    load(map(talk, range(21)), task=task)
    load(map(talk, range(20)), task=task, max_length=32)
    assert calls["encode"] == 61


def test_the_key_holds_format_task_tokenizer_and_the_source_of_a_custom_function(tmp_path):
    settings, found = schema.DataSettings(**SETTINGS), source([])
    function = tmp_path / "rows.py"
    function.write_text("def f(row): return 'a'")

    def key(template: str = "llama3", **identity: object) -> str:
        return dataset._cache_key(found, build(template), settings, identity)

    own = {"format": {"function": f"{function}:f"}}
    keys = [key(), key("qwen"), key(task={"train_on": "last"}), key(format={"key": "x"}), key(**own)]
    function.write_text("def f(row): return 'b'")
    keys.append(key(**own))
    assert len(set(keys)) == len(keys)
    build("llama3")("leaves padding and truncation set", padding="max_length", max_length=9, truncation=True)
    assert key() == keys[0]


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other", "report"])
def test_a_damaged_entry_is_made_anew_with_a_warning(own_cache, caplog, damage):
    before = texts(load(map(talk, range(20))).train)
    [report] = own_cache.rglob("report.json")
    column = report.with_name("train.ids.npy")
    match damage:
        case "cut":
            column.write_bytes(column.read_bytes()[:-40])
        case "empty":
            column.write_bytes(b"")
        case "gone":
            column.unlink()
        case "other":
            np.save(column, np.arange(3, dtype=np.int32))
        case "report":
            report.write_text('{"report": {"rows')
    assert texts(load(map(talk, range(20))).train) == before
    assert "is damaged, tokenising again" in caplog.text
    caplog.clear()
    load(map(talk, range(20)))
    assert not caplog.text


def test_two_at_once_tokenise_once():
    calls: Counter = Counter()
    task = counting(sft.sft(train_on="assistant"), calls)
    threads = [threading.Thread(target=load, args=(list(map(talk, range(40))), None, task)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls["encode"] == 40


# --- packing and batches


def documents(seed: int = 0, count: int = 57, longest: int = 40) -> Rows:
    """Rows whose every token names its document (hundreds) and its place; the first third of each is masked."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    ids = np.concatenate([100 * (number + 1) + np.arange(length) for number, length in enumerate(lengths)])
    masked = np.concatenate([np.arange(length) < length // 3 for length in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.where(masked, IGNORED, ids).astype(np.int32)
    return Rows(ids.astype(np.int32), labels, offsets, pack(lengths, longest))


def batches(rows: Rows, **changes: object) -> Batches:
    longest = int(rows.lengths.max()) if len(rows) else 8
    settings = {"packing": True, "max_length": max(longest, 64), "rows_per_batch": 3, "accumulation": 2, "seed": 7,
                "shuffle": True, "pad_id": 0, **changes}  # fmt: skip
    return Batches(rows, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_each_document_once_and_never_too_much(seed):
    lengths = np.random.default_rng(seed).integers(1, 129, 500)
    packs = pack(lengths, 128)
    assert sorted(packs.rows.tolist()) == list(range(500))
    sizes = np.add.reduceat(lengths[packs.rows], packs.offsets[:-1])
    assert sizes.max() <= 128
    assert sorted(sizes) == sorted(128 - left for left in spaces_left(lengths, 128))


def spaces_left(lengths: np.ndarray, capacity: int) -> list[int]:
    """Best-fit decreasing as the textbook has it, in O(n²)."""
    left: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [number for number, space in enumerate(left) if space >= length]
        if not fitting:
            left.append(capacity - length)
        else:
            left[min(fitting, key=lambda number: left[number])] -= length
    return left


def test_packing_is_best_fit_decreasing():
    packs = pack(np.array([2, 5, 7, 1, 4]), 10)
    members = [packs.rows[a:b].tolist() for a, b in zip(packs.offsets, packs.offsets[1:], strict=False)]
    assert members == [[2, 0, 3], [1, 4]]  # 7 + 2 + 1, 5 + 4


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


@pytest.mark.parametrize("layout", ["packed", "padded", "end to end"])
def test_the_ends_of_documents_and_the_trained_positions_are_told(layout):
    made = batches(documents(), packing=layout == "packed", max_length=40)
    made = made.laid_end_to_end() if layout == "end to end" else made
    shapes = set()
    for batch in made.one_pass():
        ids, labels, positions = (batch[key].flatten() for key in ("input_ids", "labels", "position_ids"))
        ends = batch["document_ends"].tolist()
        assert (ends[0], ends[-1]) == (0, len(ids))
        for start, end in itertools.pairwise(ends):
            inside = ids[start:end]
            assert len(set((inside[inside > 0] // 100).tolist())) <= 1, "one document, or padding"
            length = int((inside > 0).sum())
            assert positions[start:end].tolist() == [*range(length), *[0] * (end - start - length)]
        assert batch["trained_at"].equal((labels != IGNORED).nonzero()[:, 0])
        assert max(len(ids[a:b]) for a, b in itertools.pairwise(ends)) <= batch["longest"] == 40
        shapes.add(len(ends))
    assert len(shapes) == 1 or layout != "packed", "packed batches have one shape"


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


def test_the_labels_of_a_document_are_its_own_shifted_by_one():
    rows = documents()
    batch = batches(rows, packing=False, shuffle=False, rows_per_batch=1, max_length=40).step(0)[0]
    ids, labels = rows[0]
    assert batch["labels"][0, : len(ids) - 1].tolist() == labels[1:].tolist()
    assert batch["labels"][0, len(ids) - 1 :].eq(IGNORED).all()


def test_the_padding_at_the_end_is_a_document_of_its_own():
    batch = batches(documents(), max_length=50, rows_per_batch=40, packing=True).step(0)[0]
    starts = (batch["position_ids"] == 0).sum(axis=1)
    padding = batch["input_ids"] == 0
    assert padding.any(axis=1).all()
    for row in range(len(padding)):
        first = int(padding[row].nonzero()[0])
        assert not batch["position_ids"][row, first:].any()
        assert starts[row] >= 2 or first == 0


def same(left: list[dataset.Batch], right: list[dataset.Batch]) -> bool:
    return len(left) == len(right) and all(
        a[key].equal(b[key]) if hasattr(a[key], "equal") else a[key] == b[key]
        for a, b in zip(left, right, strict=True)
        for key in a
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_depends_on_seed_and_number_alone(packing):
    one, other = (batches(documents(), packing=packing, max_length=40) for _ in range(2))
    for step in (5, 0, 17, 5):
        assert same(one.step(step), other.step(step))
    assert not same(one.step(0), one.step(1))
    assert not same(one.step(0), batches(documents(), packing=packing, max_length=40, seed=8).step(0))


def seen_in(steps: Iterable[list[dataset.Batch]]) -> Counter[int]:
    return Counter(int(i) for step in steps for batch in step for i in batch["input_ids"].flatten() if i > 0)


def test_every_epoch_has_every_document_once_in_an_order_of_its_own():
    rows = documents(count=30)
    made = batches(rows, packing=False, rows_per_batch=5, accumulation=2, max_length=40)
    epochs = [[made.step(3 * epoch + step) for step in range(3)] for epoch in range(2)]
    assert seen_in(epochs[0]) == seen_in(epochs[1]) == Counter(rows.ids.tolist())
    assert not same(epochs[0][0], epochs[1][0])


def test_steps_run_on_across_epochs():
    rows = documents(count=7)
    made = batches(rows, packing=False, rows_per_batch=5, accumulation=1, max_length=40)
    assert seen_in(made.step(step) for step in range(7)) == Counter(rows.ids.tolist() * 5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 0.5])
def test_a_limit_of_epochs_shortens_the_last_step(packing, epochs):
    rows = documents()
    made = batches(rows, packing=packing, epochs=epochs, max_length=40)
    steps = [made.step(number) for number in range(made.steps(None, epochs, None))]
    assert made.epoch(len(steps)) == pytest.approx(epochs, abs=0.02)
    assert made.tokens_at(len(steps)) == sum(batch["tokens"] for step in steps for batch in step)
    assert all(step for step in steps)
    if isinstance(epochs, int):
        assert seen_in(steps) == Counter(rows.ids.tolist() * epochs)


def test_tokens_and_steps_agree():
    made = batches(documents(), packing=True, max_length=40)
    counted = np.cumsum([0, *(sum(batch["tokens"] for batch in made.step(step)) for step in range(30))])
    assert [made.tokens_at(step) for step in range(31)] == counted.tolist()
    for wanted in (1, 500, int(counted[7]), int(counted[7]) + 1, 4000):
        assert made.steps(max_tokens=wanted) == np.searchsorted(counted, wanted)
    assert made.steps(12, None, None) == 12
    assert made.steps(12, None, int(counted[7])) == 7
    with pytest.raises(ConfigError, match="no stopping criterion"):
        made.steps(None, None, None)


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_what_one_would_see(packing):
    rows = documents()
    alone = batches(rows, packing=packing, rows_per_batch=4, max_length=40, epochs=1)
    ranks = [batches(rows, packing=packing, rows_per_batch=2, max_length=40, epochs=1, rank=r, world=2) for r in (0, 1)]
    assert alone.steps() == ranks[0].steps()
    for step in range(alone.steps()):
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


# --- configuration


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(bind.config_dir()), version_base="1.3"):
        return bind.to_plain(compose("config", list(overrides)))["data"]


@pytest.mark.parametrize("name", ["chitchat", "local", "hub"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "prompt_completion", "text"])
def test_every_source_composes_with_every_format(name, form, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    path = [] if name == "chitchat" else [f"data.path={tmp_path}/rows.jsonl"]
    settings, form_node, source_node = schema.split_data(composed(f"data={name}", f"data/format={form}", *path))
    assert form_node["_target_"] == f"runner.data.formats.{form}"
    assert source_node["_target_"] == f"runner.data.sources.{name}"
    bind.bind(source_node, "data")
    bind.bind(form_node, "data.format")
    # Every source takes the length of conf/data/base.yaml, but chitchat, which keeps the first run short.
    assert bind.bind(settings, "data", schema.DataSettings)().max_length == (256 if name == "chitchat" else 512)


def test_wrong_settings_are_refused_together():
    node, _, _ = schema.split_data(composed("data.max_length=2", "data.overlong=truncat", "data.eval_fraction=1"))
    with pytest.raises(ConfigError) as caught:
        bind.bind(node, "data", schema.DataSettings)
    assert [fault.key for fault in caught.value.faults] == ["data.max_length", "data.overlong", "data.eval_fraction"]
    assert "did you mean 'truncate'?" in str(caught.value)


def test_nothing_to_evaluate_on_is_known_before_anything_is_read(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    files = ["data=local", f"data.path={rows}", "data.eval_fraction=0"]
    for refused in (["data.eval_fraction=0"], files, ["data=hub", "data.path=a/b", "data.eval_fraction=0"]):
        [fault] = schema.check_data(composed(*refused))
        assert (fault.key, fault.value) == ("data.eval_fraction", 0)
        assert "data.eval_path" in fault.remedy
    for fine in ([], [*files, f"data.eval_path={rows}"], files[:2]):
        assert not list(schema.check_data(composed(*fine)))


def test_one_by_one():
    assert len(one_by_one(3)) == 3
