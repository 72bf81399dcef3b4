"""Rows chosen by a condition, ordered by a column, and given a system prompt."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, composed, prepared
from fixtures.documents import batches

from runner.cli import main
from runner.data import row_options
from runner.data.packing import pack_in_order
from runner.errors import ConfigError, DataError
from runner.models import tokenizer_files
from runner.train import inputs, worker
from runner.train.inputs import Inputs
from runner.train.options import Options

COUNT = 40


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def row(number: int, **more: Any) -> dict[str, Any]:
    talk = [{"role": "user", "content": f"question {number}?"}, {"role": "assistant", "content": f"number {number}."}]
    return {"messages": talk, **more}


def read(file: Path, *overrides: str) -> Inputs:
    options = (*TINY[:2], "train.sample_prompts=0", "data=local", f"data.path={file}", "data.eval_fraction=0.2")
    options = (*options, "train.per_device_batch_size=1")
    return inputs.inputs(Options(composed(*options, *overrides)))


def numbers(made: Inputs, split: str = "train") -> list[int]:
    """The numbers of the rows of a split."""
    rows = getattr(made.splits, split)
    return [int(re.search(r"number (\d+)\.", text)[1]) for text in texts(made, rows)]


def texts(made: Inputs, rows: Any) -> list[str]:
    return [made.tokenizer.decode(rows[number][0]) for number in range(len(rows))]


def in_order(made: Inputs, epochs: float = 1.0) -> list[int]:
    """The numbers of the rows in the order of training."""
    steps = range(made.batches.order.steps(epochs=epochs))
    packs = [pack for step in steps for pack in made.batches.order.packs_of_step(step)]
    every = numbers(made)
    return [every[row] for row in made.batches.rows_in(packs)]


# Condition


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("score>=0.5", lambda n: n / COUNT >= 0.5),
        ("meta.lang=EN and not score>0.5", lambda n: n % 2 == 0 and n / COUNT <= 0.5),
        ("is_good=true", lambda n: n % 3 == 0),
        ("tags~long or meta.lang!=en", lambda n: n % 4 == 0 or n % 2),
        ("rare=1", lambda n: n == 7),
        ("rare!=1", lambda n: n != 7),
    ],
)  # fmt: skip
def test_rows_that_meet_the_condition_are_used(condition: str, holds: Any, tmp_path: Path, cache: Path):
    rows = [
        row(n, score=n / COUNT, meta={"lang": "de" if n % 2 else "en"}, is_good=n % 3 == 0,
            tags=["long"] * (n % 4 == 0), **({"rare": 1} if n == 7 else {}))
        for n in range(COUNT)
    ]  # fmt: skip
    expected = {n for n in range(COUNT) if holds(n)}
    file = written(tmp_path, rows)
    if len(expected) < 2:
        with pytest.raises(DataError, match="39 filtered"):
            read(file, f"data.where='{condition}'", "data.eval_fraction=0.99")
        return
    made = read(file, f"data.where='{condition}'")
    assert sorted(numbers(made) + numbers(made, "eval")) == sorted(expected)
    assert (made.splits.report.rows_read, made.splits.report.filtered) == (COUNT, COUNT - len(expected))
    assert numbers(read(file)), "another condition is another entry of the cache"


def test_rows_that_are_left_out_need_not_fit_the_format(tmp_path: Path, cache: Path):
    rows = [row(n, kind="chat") for n in range(10)] + [{"kind": "other", "text": "no messages"}]
    assert len(numbers(read(written(tmp_path, rows), "data.where='kind=chat'"))) >= 1


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        (
            "scor>1",
            r"data\.where=.*no row has the column 'scor'(?s:.*)did you mean 'score'.*columns here: messages, score",
        ),
        ("score>99", r"there are no training rows \(10 rows read, 10 filtered"),
    ],
)
def test_a_condition_that_no_row_can_meet_is_refused(condition: str, problem: str, tmp_path: Path, cache: Path):
    file = written(tmp_path, [row(n, score=n) for n in range(10)])
    with pytest.raises(DataError, match=problem):
        read(file, f"data.where='{condition}'")


def test_a_condition_with_a_syntax_error_is_refused_at_once(tmp_path: Path):
    file = written(tmp_path, [row(1)])
    with pytest.raises(ConfigError, match=r"data\.where=score>: a value is missing"):
        read(file, "data.where='score>'")


def test_each_set_may_have_its_own_condition(tmp_path: Path, cache: Path):
    one, two = (written(tmp_path, [row(n, score=n % 5) for n in range(start, start + 20)], f"{start}.jsonl")
                for start in (0, 100))  # fmt: skip
    options = (
        *TINY[:2], "data=mix", f"data.sources.one.path={one}", f"data.sources.two.path={two}", "data.where='score>0'",
        "data.sources.two.where='score=4'", f"data.evals.held.path={two}", "data.evals.held.where='score=0'",
        "data.eval_fraction=0.3", "data.max_repeats=100",
    )  # fmt: skip
    made = inputs.inputs(Options(composed(*options)))
    reports = {name: each.report for name, each in {**made.splits.sources, **made.splits.evals}.items()}
    assert {name: (each.rows_read, each.filtered) for name, each in reports.items()} == {
        "one": (20, 4), "two": (20, 16), "held": (20, 16),
    }  # fmt: skip


# Order


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize(("order", "column"), [("level", "level"), ("-level", "level"), ("meta.day", "meta.day")])
def test_each_epoch_is_trained_in_the_order_of_the_column(
    order: str, column: str, packing: str, tmp_path: Path, cache: Path
):
    levels = np.random.default_rng(0).permutation(COUNT)
    rows = [row(n, level=int(levels[n]) / 7, meta={"day": f"2024-01-{levels[n]:02d}"}) for n in range(COUNT)]
    made = read(written(tmp_path, rows), f"data.order_by={order}", f"data.packing={packing}", "data.max_length=128")
    assert len(made.batches.packs) > 3
    once = [int(levels[n]) for n in in_order(made)]
    assert once == sorted(once, reverse=order.startswith("-"))
    twice = in_order(made, epochs=2.0)
    assert twice[: len(once)] == twice[len(once) :] == in_order(made)


def test_equal_values_are_shuffled_anew_in_each_epoch(tmp_path: Path, cache: Path):
    rows = [row(n, level=n % 2) for n in range(COUNT)]
    made = read(written(tmp_path, rows), "data.order_by=level", "data.packing=false")
    first, second = np.split(np.array(in_order(made, epochs=2.0)), 2)
    for epoch in (first, second):
        assert (np.diff(epoch % 2) >= 0).all()
    assert first.tolist() != second.tolist()
    other = in_order(read(written(tmp_path, rows), "data.order_by=level", "data.packing=false", "seed=1"))
    assert other != first.tolist()


def test_packs_are_filled_one_after_the_other():
    draw = np.random.default_rng(1)
    lengths, places = draw.integers(1, 30, 60), draw.permutation(60)
    packs = pack_in_order(lengths, places, 1, 40)
    assert places[packs.rows].tolist() == list(range(60))
    sizes = [lengths[packs.rows[a:b]].sum() for a, b in itertools.pairwise(packs.offsets)]
    assert max(sizes) <= 40
    for (start, end), size in zip(itertools.pairwise(packs.offsets), sizes, strict=True):
        assert start < end
        assert end == 60 or size + lengths[packs.rows[end]] > 40, "the next row does not fit"
    pairs = pack_in_order(lengths, places // 2 * 2, 2, 80)
    assert (pairs.rows.reshape(-1, 2) % 2 == [0, 1]).all(), "units stay together"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1, "b"], "has numbers and other values, such as 1 and 'b'"),
        ([1, None], r"rows\.jsonl:2: has no 'level'"),
        ([[1], [2]], "without an order"),
        ([True, False], "without an order"),
        ([3, 3], "all rows have the same value"),
    ],
)  # fmt: skip
def test_a_column_without_an_order_is_refused(values: list[Any], problem: str, tmp_path: Path, cache: Path):
    file = written(tmp_path, [row(n, level=values[n % 2]) for n in range(10)])
    with pytest.raises(DataError, match=problem):
        read(file, "data.order_by=level")


@pytest.mark.parametrize(
    ("given", "typecode"),
    [([3, 1, 2], "q"), ([0.3, 0.1, 0.2], "d"), (["c", "a", "b"], ""), ([2, 0.5, 1], ""), ([2**70, 1, 2**60], "")],
)
def test_numbers_of_one_kind_take_eight_bytes_each_and_all_have_one_order(given: list[Any], typecode: str):
    values = row_options.Values()
    for value in given:
        values.append(value)
    assert list(values.content) == given
    assert getattr(values.content, "typecode", "") == typecode
    assert row_options.ranks(values.content, "x").tolist() == [2, 0, 1]
    assert row_options.ranks(values.content, "-x").tolist() == [0, 2, 1]


def test_a_run_in_order_resumes_exactly(tmp_path: Path, cache: Path):
    from fixtures.stopped_runs import preempted_run

    file = written(tmp_path, [row(n, level=n) for n in range(COUNT)])
    options = (*TINY[:2], "train.sample_prompts=0", "data=local", f"data.path={file}", "data.order_by=-level",
               "data.system_prompt=Be brief.", "data.where='level>2'", "data.max_length=128", "train.max_steps=4",
               "train.save_steps=2", "data.eval_fraction=0.2")  # fmt: skip
    whole, halves = prepared(tmp_path / "whole", *options), preempted_run(tmp_path / "halves", *options)
    assert worker.work(whole) == worker.work(halves) == 0
    first, second = ((each.model / "adapter_model.safetensors").read_bytes() for each in (whole, halves))
    assert first == second


def test_a_batch_without_places_is_shuffled_as_before():
    from test_collator import documents

    plain = batches(documents(), packing=True, max_length=40)
    assert plain.rows.places is None
    assert plain.order.packs_of_step(0) != sorted(plain.order.packs_of_step(0))


# System prompt


def test_each_conversation_begins_with_the_system_prompt(tmp_path: Path, cache: Path):
    own = [{"role": "system", "content": "I am mine."}, *row(99)["messages"]]
    file = written(tmp_path, [*[row(n) for n in range(COUNT)], {"messages": own}])
    made = read(file, "data.system_prompt=Be brief.")
    for split in ("train", "eval"):
        for text in texts(made, getattr(made.splits, split)):
            system = "I am mine." if "number 99." in text else "Be brief."
            assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    assert made.splits.report.own_system_prompt == 1
    plain = set(texts(read(file), read(file).splits.train))
    assert not any("Be brief" in text for text in plain)


@pytest.mark.parametrize(
    "words",
    [
        "task=dpo data=chitchat_pairs",
        "task=kto data=chitchat_pairs data/format=preference",
        "task=grpo data=chitchat_prompts data.packing=false "
        "task.rewards=[runner.tasks.example_rewards:lowercase_share] task.max_completion_length=8",
    ],
)
def test_prompts_of_other_tasks_begin_with_it_too(words: str, cache: Path):
    made = inputs.inputs(
        Options(composed(*TINY, "data.max_length=1024", *words.split(), "data.system_prompt=Be brief."))
    )
    assert all(text.startswith("<|im_start|>system\nBe brief.") for text in texts(made, made.splits.train))


def test_rows_that_have_no_system_prompt_refuse_it(tmp_path: Path, cache: Path):
    file = written(tmp_path, [{"text": f"plain text {n}"} for n in range(9)])
    with pytest.raises(DataError, match=r"data\.system_prompt=.*is plain text"):
        read(file, "task=pretrain", "data/format=text", "data.system_prompt=Be brief.")
    own = [{"role": "system", "content": "I am mine."}, *row(1)["messages"]]
    file = written(tmp_path, [{"messages": [own[0], *row(n)["messages"]]} for n in range(9)])
    with pytest.raises(DataError, match="all rows have a system prompt of their own"):
        read(file, "data.system_prompt=Be brief.")


def test_the_plan_counts_rows_and_generate_uses_the_prompt(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = written(tmp_path, [row(n, level=n) for n in range(COUNT)])
    options = (*TINY[:2], "train.sample_prompts=0", "data=local", f"data.path={file}", "data.eval_fraction=0.2",
               "data.system_prompt=Be brief.", "data.where='level>2'", "train.max_steps=1")  # fmt: skip
    assert main.run(["plan", *options]) == 0
    shown = capsys.readouterr().out
    assert "3 left out by data.where=level>2" in " ".join(shown.split())
    assert "Be brief." in shown
    rundir = prepared(tmp_path / "run", *options)
    assert worker.work(rundir) == 0

    from runner.cli import generate

    given: list[Any] = []
    monkeypatch.setattr(generate, "_generate", lambda *arguments, **_: given.append(arguments[-1]) or "")
    assert main.run(["generate", str(rundir.path), "Hello?"]) == 0
    assert main.run(["generate", str(rundir.path), "Hello?", "--system", "Another."]) == 0
    assert [talk[0]["content"] for talk in given] == ["Be brief.", "Another."]


# Chat template


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_template_of_ones_own_replaces_that_of_the_model(tmp_path: Path, cache: Path):
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    rows = written(tmp_path, [row(n) for n in range(COUNT)])
    made = read(rows, f"model.chat_template={file}")
    reference = tokenizer_files.load(read(rows).source)
    reference.chat_template = TEMPLATE
    every = dict(zip(numbers(made), texts(made, made.splits.train), strict=True))
    for number, text in every.items():
        assert text == reference.apply_chat_template(row(number)["messages"], tokenize=False)


def test_a_column_is_found_by_its_name_or_inside_of_an_object():
    data = {"a.b": 1, "a": {"b": 2, "c": {"d": 3}}}
    assert [row_options.value_of(data, name) for name in ("a.b", "a.c.d", "a.x", "x")] == [1, 3, None, None]
