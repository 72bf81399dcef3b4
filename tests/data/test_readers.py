"""Every kind of file is read, and every bad one is refused by name and line."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fixtures.data_files import ROWS, folder, local, places, rows, write

from runner.errors import DataError


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.json", "d.csv", "deep/e.tsv", "deep/f.parquet"])
def test_every_kind_of_file_gives_the_same_rows(folder, name):
    assert rows(local(folder / name)) == ROWS


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
