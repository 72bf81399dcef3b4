"""Options of the group data: files, the embedded conversations, the Hub."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.data_files import ROWS, folder, local, places, rows, write

from runner.data import sources
from runner.errors import DataError


@pytest.mark.parametrize(("name", "times"), [("rows.json", 1), ("rows.jsonl", 3)])
def test_a_json_text_is_parsed_once_for_all_passes(name, times, tmp_path, monkeypatch):
    file = write(tmp_path / name, json.dumps(ROWS) if name.endswith("json") else "\n".join(map(json.dumps, ROWS)))
    parsed, read = [], sources.readers.read
    monkeypatch.setattr(
        sources.readers, "read", lambda files, documents: parsed.append(files) or read(files, documents)
    )
    source = local(file)
    assert [rows(source) for _ in range(3)] == [ROWS] * 3
    assert len(parsed) == times


def test_folders_and_globs_mix_kinds(folder):
    assert rows(local(folder)) == ROWS * 6
    assert rows(local(folder / "*.json")) == ROWS * 2
    assert rows(local(folder / "**" / "*.parquet")) == ROWS


def test_the_digest_is_of_the_content_not_of_the_place(folder, tmp_path):
    moved = write(tmp_path / "elsewhere" / "z.jsonl", (folder / "a.jsonl").read_bytes())
    before = local(folder / "a.jsonl").digest
    assert local(moved).digest == before
    assert local(moved, eval_path=moved).digest != before
    moved.write_text('{"text": "changed"}')
    assert local(moved).digest != before
    assert len(before) <= 36  # what MLflow takes


def test_paths_that_lead_nowhere(tmp_path):
    write(tmp_path / "rows.jsonl", "{}")
    write(tmp_path / "rows.xlsx", "{}")
    (tmp_path / "empty").mkdir()
    for path, problem in {
        "row.jsonl": "no such file or folder. did you mean 'rows.jsonl'?",
        "nowhere/row.jsonl": "no such file or folder",
        "rows.xlsx": "unsupported file type.",
        "empty": "contains no file of a supported type (.json, .jsonl",
        "*.csv": "contains no file of a supported type",
    }.items():
        with pytest.raises(DataError) as caught:
            local(tmp_path / path)
        assert problem in str(caught.value)
        assert str(caught.value).startswith(f"data.path={tmp_path / path}: ")
    faults = list(sources.check_local(path=str(tmp_path / "no.json"), eval_path=str(tmp_path / "x"), documents="file"))
    assert [fault.key for fault in faults] == ["path", "eval_path"]
    rows = str(tmp_path / "rows.jsonl")
    assert not list(sources.check_local(path=rows, eval_path=None, documents="file"))
    [fault] = sources.check_local(path=rows, eval_path=None, documents="paragraph")
    assert (fault.key, fault.value) == ("documents", "paragraph")
    (tmp_path / "held_out.txt").write_text("a text")
    assert not list(sources.check_local(path=rows, eval_path=str(tmp_path / "held_out.txt"), documents="paragraph"))


def test_a_revision_of_local_files_is_refused(tmp_path):
    more = {"name": None, "split": "train", "eval_split": None}
    [fault] = sources.check_hub(path=str(tmp_path), revision="main", **more)
    assert fault.key == "revision"
    assert not list(sources.check_hub(path=str(tmp_path), revision=None, **more))
    assert not list(sources.check_hub(path="owner/name", revision="main", **more))


def test_a_stream_begins_with_the_first_row_of_a_split_of_the_hub(tmp_path):
    more = {"name": None, "revision": None, "streaming": True}
    [fault] = sources.check_hub(path=str(tmp_path), split="train", eval_split=None, **more)
    assert (fault.key, fault.value, fault.remedy) == ("streaming", True, "set data.streaming=false")
    parts = {"split": "train[10:]", "eval_split": "validation+test"}
    assert [fault.key for fault in sources.check_hub(path="owner/name", **parts, **more)] == ["split", "eval_split"]
    assert not list(sources.check_hub(path="owner/name", **parts, **{**more, "streaming": False}))
    assert not list(sources.check_hub(path="owner/name", split="train", eval_split="test", **more))


def test_chitchat_alternates_and_ends_with_an_answer():
    source = sources.chitchat()
    found = [row["messages"] for _, row in source.train]
    assert len(found) > 3000
    for messages in found:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)
    assert source.uri.startswith("package:chitchat-dataset==")


@pytest.mark.parametrize(("rejected", "number"), [("answer", 3), ("opening", 0)])
def test_rejected_answers_are_messages_of_another_conversation(rejected, number):
    source = sources.chitchat_pairs(rejected=rejected)
    longer = [row["messages"] for _, row in sources.chitchat().train if len(row["messages"]) >= 4]
    texts = {messages[number]["content"] for messages in longer}
    beginnings = {str(messages[:4]) for messages in longer}
    for _, row in source.train:
        (chosen,), (other,) = row["chosen"], row["rejected"]
        assert str([*row["prompt"], chosen]) in beginnings
        assert chosen["role"] == other["role"] == "assistant"
        assert other["content"] in texts - {chosen["content"]}
    assert (source.digest == sources.chitchat().digest) == (rejected == "answer")


def test_chitchat_classes_are_questions_and_the_first_messages_about_them():
    whole, short = (sources.chitchat_classes(classes=2, messages=count) for count in (None, 4))
    rows, cut = ([row for _, row in source.train] for source in (whole, short))
    assert len({row["label"] for row in rows}) == 2
    assert cut == [{**row, "messages": row["messages"][:4]} for row in rows]
    assert max(len(row["messages"]) for row in rows) > 4
    cued = sources.chitchat_classes(classes=2, messages=4, cue="About:")
    texts = ["\n".join([*(each["content"] for each in row["messages"]), "About:"]) for row in cut]
    expected = [{"text": text, "label": row["label"]} for text, row in zip(texts, cut, strict=True)]
    assert [row for _, row in cued.train] == expected
    assert len({source.digest for source in (whole, short, cued)}) == 3


def test_chitchat_joins_turns_and_leaves_out_what_is_no_conversation(tmp_path):
    def said(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text, "timestamp": ""} for text in texts]

    conversations = {
        "joined": {
            "messages": [said("a", "Hi", " there "), said("b", "", "Yes?"), said("b", "Go on."), said("a", "Bye")]
        },
        "empty answer": {"messages": [said("a", "Hi"), said("b", " "), said("a", "Anyone?")]},
        "alone": {"messages": [said("a", "Hi")]},
    }
    file = write(tmp_path / "dataset.json", json.dumps(conversations))
    [(place, row)] = sources._conversations(file)
    assert str(place) == "dataset.json, row 1"
    assert [message["content"] for message in row["messages"]] == ["Hi there", "Yes? Go on."]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A dataset in the Hub's layout: parquet files, and a README whose head says which split is which."""
    (tmp_path / "data").mkdir()
    for split, found in (("train", ROWS), ("test", ROWS[:1])):
        pq.write_table(pa.Table.from_pylist(found), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    head = ["configs:", "- config_name: plain", "  data_files:"]
    head += [f"  - split: {split}\n    path: data/{split}-*" for split in ("train", "test")]
    write(tmp_path / "README.md", "---\n" + "\n".join(head) + "\n---\n")
    return tmp_path


def hub(path: object, **changes: str | None) -> sources.Source:
    keys = {"name": None, "split": "train", "eval_split": None, "revision": None, **changes}
    return sources.hub(path=str(path), **keys)


def test_a_folder_in_the_hubs_layout(hub_folder):
    source = hub(hub_folder, eval_split="test")
    assert rows(source) == ROWS
    assert [row for _, row in source.eval or ()] == ROWS[:1]
    assert places(source)[2] == f"{hub_folder}[train], row 3"
    assert source.digest == hub(hub_folder, eval_split="test").digest != hub(hub_folder).digest
    assert rows(hub(hub_folder, split="train[:2]", name="plain")) == ROWS[:2]


def test_splits_and_names_that_do_not_exist(hub_folder):
    with pytest.raises(DataError, match=r'Unknown split "tset"') as caught:
        hub(hub_folder, split="tset")
    assert "data.split" in str(caught.value)
    with pytest.raises(DataError, match="fancy"):
        hub(hub_folder, name="fancy")


def test_offline_and_not_in_the_cache():
    with pytest.raises(DataError, match="not in the cache, and HF_HUB_OFFLINE is set") as caught:
        hub("somebody/something")
    assert "data=local data.path=" in str(caught.value)
