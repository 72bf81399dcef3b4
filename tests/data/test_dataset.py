"""A tokenised dataset comes from the cache, and is the same as without it."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import errno
import os
import threading
from collections import Counter

import numpy as np
import pytest
from fixtures.chat_tokenizer import build
from fixtures.documents import SETTINGS, load, own_cache, source, talk, texts
from hydra import compose, initialize_config_dir

from runner.config import bind, schema
from runner.data import dataset
from runner.data.packing import one_by_one
from runner.errors import ConfigError, DataError
from runner.tasks import sft
from runner.tasks import task as tasks


def test_a_full_disk_leaves_nothing_half_written(own_cache, monkeypatch):
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(DataError, match="cannot be written: No space left on device") as caught:
        load(map(talk, range(9)))
    assert "RUNNER_CACHE" in str(caught.value)
    assert [path.suffix for path in (own_cache / "data").iterdir()] == [".lock"]


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
