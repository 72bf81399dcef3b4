"""Every kind of file is read, and every bad one is refused by name and line."""

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

from runner.data import sources
from runner.errors import DataError

ROWS = [{"text": "one"}, {"text": "two — 好"}, {"text": "three, with a comma"}]


def local(path: Path | str, eval_path: Path | str | None = None, documents: str = "file") -> sources.Source:
    return sources.local(path=str(path), eval_path=str(eval_path) if eval_path else None, documents=documents)


def rows(source: sources.Source) -> list[dict]:
    return [row for _, row in source.train]


def places(source: sources.Source) -> list[str]:
    return [str(place) for place, _ in source.train]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same rows in every kind of file."""
    lines = "\n".join(json.dumps(row) for row in ROWS)
    write(tmp_path / "a.jsonl", lines + "\n\n")
    write(tmp_path / "b.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "c.json", json.dumps({"version": 1, "data": ROWS}))
    write(tmp_path / "d.csv", 'text\none\ntwo — 好\n"three, with a comma"\n')
    write(tmp_path / "deep" / "e.tsv", "\ufefftext\none\ntwo — 好\nthree, with a comma\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "deep" / "f.parquet")
    write(tmp_path / "README.md", "not data")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.json", "d.csv", "deep/e.tsv", "deep/f.parquet"])
def test_every_kind_of_file_gives_the_same_rows(folder, name):
    assert rows(local(folder / name)) == ROWS


def test_folders_and_globs_mix_kinds(folder):
    assert rows(local(folder)) == ROWS * 6
    assert rows(local(folder / "*.json")) == ROWS * 2
    assert rows(local(folder / "**" / "*.parquet")) == ROWS


def test_rows_know_where_they_stand(folder):
    assert places(local(folder / "a.jsonl"))[1] == f"{folder}/a.jsonl:2"
    assert places(local(folder / "d.csv"))[0] == f"{folder}/d.csv:2"
    assert places(local(folder / "deep/f.parquet"))[2] == f"{folder}/deep/f.parquet, row 3"


def test_one_object_is_one_row(tmp_path):
    assert rows(local(write(tmp_path / "one.json", '{"text": "one"}'))) == [{"text": "one"}]


def test_text_by_file_and_by_paragraph(tmp_path):
    file = write(tmp_path / "book.txt", "\nA first\nparagraph.\n\n  \nA second.\n")
    assert rows(local(file)) == [{"text": "A first\nparagraph.\n\n  \nA second."}]
    by_paragraph = local(file, documents="paragraph")
    assert rows(by_paragraph) == [{"text": "A first\nparagraph."}, {"text": "A second."}]
    assert places(by_paragraph) == [f"{file}:2", f"{file}:6"]


def test_a_text_is_split_at_newlines_only(tmp_path):
    file = write(tmp_path / "book.txt", "one\x0cpage\u2028\u2029a\u0085b\x1cc\rd\r\ne\r\n\r\n\nsecond\n\x0c\nthird")
    assert [row["text"] for row in rows(local(file, documents="paragraph"))] == [
        "one\x0cpage\u2028\u2029a\u0085b\x1cc\rd\ne", "second", "third",
    ]  # fmt: skip
    assert places(local(file, documents="paragraph")) == [f"{file}:1", f"{file}:5", f"{file}:7"]
    lines = write(tmp_path / "x.jsonl", '{"text":\r"one"}\r\n{"text": "two\u2028\u0085"}\n')
    assert rows(local(lines)) == [{"text": "one"}, {"text": "two\u2028\u0085"}]


def test_a_folder_is_entered_once_however_often_it_is_linked(folder):
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    (folder / "deep" / "here").symlink_to(folder / "deep")
    assert rows(local(folder)) == ROWS * 6
    assert rows(local(folder / "**" / "*.json")) == ROWS * 2
    assert rows(local(folder / "**" / "deep" / "*.parquet")) == ROWS


def test_a_folder_outside_is_read_by_its_link(folder, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(folder / "deep")
    assert rows(local(inside)) == ROWS * 2


def test_brackets_in_the_name_of_a_folder(tmp_path):
    write(tmp_path / "rows [1]*" / "x.jsonl", '{"text": "one"}')
    assert rows(local(tmp_path / "rows [1]*")) == [{"text": "one"}]


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("pipe.jsonl", "*.jsonl", "."):
        with pytest.raises(DataError, match=r"pipe\.jsonl is no regular file"):
            local(tmp_path / path)
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"device\.csv is no regular file"):
        local(tmp_path / "*.csv")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"gone\.txt is a link to nothing"):
        local(tmp_path / "*.txt")


@pytest.mark.parametrize("path", ["", " ", "~nobody-of-this-name/x.jsonl", "a" * 5000 + ".jsonl", "x\0.jsonl"])
def test_paths_that_cannot_be(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        local(path)
    assert caught.value.faults[0].key == "data.path"


def test_tables_of_parquet_that_cannot_be_read(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    with pytest.raises(DataError, match=r"x\.parquet: the column 'text' stands twice"):
        rows(local(file))
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    content = bytearray(file.read_bytes())
    content[30:60] = bytes(30)
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"x\.parquet: damaged"):
        rows(local(file))
    halves = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": halves}), file)
    with pytest.raises(DataError, match=r"x\.parquet: damaged"):
        rows(local(file))


def test_the_digest_is_of_the_content_not_of_the_place(folder, tmp_path):
    moved = write(tmp_path / "elsewhere" / "z.jsonl", (folder / "a.jsonl").read_bytes())
    before = local(folder / "a.jsonl").digest
    assert local(moved).digest == before
    assert local(moved, eval_path=moved).digest != before
    moved.write_text('{"text": "changed"}')
    assert local(moved).digest != before
    assert len(before) <= 36  # what MLflow takes


@pytest.mark.parametrize(
    ("name", "content", "message", "remedy"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": 2\n', r"x\.jsonl:2: malformed JSON: .*column 8", "correct that line"),
        ("x.jsonl", '[\n{"a": 1}\n]', r"x\.jsonl:1: malformed JSON", "rename the file to .json:"),
        ("x.json", '[{"a": 1},\n {"a": }]', r"x\.json:2: malformed JSON", "correct that line"),
        ("x.json", '{"a": 1}\n{"a": 2}\n', r"x\.json:2: malformed JSON: Extra data", "rename the file to .jsonl:"),
        ("x.jsonl", '{"a": 1}\n[1, 2]\n', r"x\.jsonl:2: a row must be a JSON object, not list", '{"messages"'),
        ("x.json", "[1, 2]", r"x\.json, row 1: a row must be a JSON object, not int", '{"text"'),
        ("x.csv", "a,b\n1,2\n3\n", r"x\.csv:3: number of values differs from number of columns \(a, b\)", "quote"),
        ("x.csv", "a,b\n1,2,3\n", r"x\.csv:2: number of values differs", "quote"),
        ("x.csv", 'a,b\n1,"2\n', r"x\.csv:2: malformed table", "correct that line"),
        ("x.jsonl", "", r"x\.jsonl: contains no rows", "add rows"),
        ("x.json", " \n", r"x\.json: contains no rows", "add rows"),
        ("x.txt", "\n", r"x\.txt: contains no rows", "add rows"),
        ("x.csv", "a,b\n", r"x\.csv: contains no rows", "add rows"),
        ("x.jsonl", b"\x80\x00\xff", r"x\.jsonl: is not UTF-8 text .* at byte 0", "iconv"),
        ("x.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}', r"x\.jsonl:2: the key 'b' stands twice", "correct that line"),
        ("x.json", '[{"a": 1},\n {"b\\"": "b",\n "a": 1, "a": 2}]', r"x\.json:3: the key 'a' stands twice", "correct"),
        ("x.csv", "a,b,a\n1,2,3\n", r"x\.csv:1: the column 'a' stands twice", "rename or remove"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", r"x\.jsonl:2: a number has too many digits", "as a text"),
        ("x.json", '[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", r"x\.json:2: a number has too many digits", "as a text"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "[" * 9000 + "]" * 9000 + "}", r"x\.jsonl:2: .* nested too deep", "less deep"),
        (
            "x.json",
            '[{"a": [1]},\n{"a": ' + "[" * 9000 + "]" * 9000 + "}]",
            r"x\.json:2: .* nested too deep",
            "less deep",
        ),
        (
            "x.parquet",
            b"PAR1 but not really",
            r"x\.parquet: damaged or not a parquet file",
            "write or download the file again",
        ),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message, remedy):
    source = local(write(tmp_path / name, content))
    with pytest.raises(DataError, match=message) as caught:
        list(source.train)
    assert remedy in caught.value.faults[0].remedy


def test_paths_that_lead_nowhere(tmp_path):
    write(tmp_path / "rows.jsonl", "{}")
    write(tmp_path / "rows.xlsx", "{}")
    (tmp_path / "empty").mkdir()
    for path, problem in {
        "row.jsonl": "no such file or folder. did you mean 'rows.jsonl'?",
        "nowhere/row.jsonl": "no such file or folder.",
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


def test_a_wrong_extension_suggests_the_right_one(tmp_path):
    with pytest.raises(DataError, match=r"did you mean '\.jsonl'\?"):
        local(write(tmp_path / "rows.jsonll", "{}"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    file = write(tmp_path / "x.jsonl", "{}")
    file.chmod(0)
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read: Permission denied"):
        local(file)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_a_file_the_machine_cannot_read(tmp_path):
    (tmp_path / "x.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read: Input/output error"):
        local(tmp_path / "x.jsonl")


def test_chitchat_alternates_and_ends_with_an_answer():
    source = sources.chitchat()
    found = [row["messages"] for _, row in source.train]
    assert len(found) > 3000
    for messages in found:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)
    assert source.uri.startswith("package:chitchat-dataset==")


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


class _Answers(http.server.BaseHTTPRequestHandler):
    """A Hub that refuses each dataset in the way its name asks for."""

    CODES: ClassVar = {
        "gated": (403, "GatedRepo"),
        "missing": (401, "RepoNotFound"),
        "branch": (404, "RevisionNotFound"),
    }

    def do_GET(self) -> None:
        status, code = next(answer for word, answer in self.CODES.items() if word in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask_hub(endpoint: str, path: str) -> tuple[str, float]:
    """What `data=hub` says in a process of its own, online, against the given Hub; and after how many seconds."""
    code = (
        "import time; from runner.data import sources; import huggingface_hub; began = time.time()\n"
        f"try: sources.hub(path={path!r}, name=None, split='train', eval_split=None, revision=None)\n"
        "except Exception as error: print(type(error).__name__, error, time.time() - began, sep='\\n')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    said, _, seconds = done.stdout.strip().rpartition("\n")
    return said, float(seconds)


def test_what_the_hub_refuses_is_said_with_its_remedy(refusing_hub):
    said, _ = ask_hub(refusing_hub, "some/gated")
    assert said.startswith("DataError\ndata.path=some/gated: is a gated dataset and your token has no access")
    assert "hf auth login" in said
    said, _ = ask_hub(refusing_hub, "some/missing")
    assert "no such dataset on the Hub, or it is private" in said
    said, _ = ask_hub(refusing_hub, "some/branch")
    assert "has no such revision" in said


def test_a_hub_out_of_reach_is_said_within_seconds():
    said, seconds = ask_hub("http://127.0.0.1:9", "some/thing")
    assert "the Hub cannot be reached" in said
    assert "HF_HUB_OFFLINE=1" in said
    assert seconds < 10
