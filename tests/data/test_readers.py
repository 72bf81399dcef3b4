"""Every kind of file is read, and every bad one is refused by name and line."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
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


def test_line_ends_of_old_macs(tmp_path):
    file = tmp_path / "mac.txt"
    file.write_bytes(b"A first\rparagraph.\r\rA second.\r")
    assert [row["text"] for row in rows(local(file, documents="paragraph"))] == ["A first\nparagraph.", "A second."]


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


def test_tables_of_parquet_that_cannot_be_read(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    with pytest.raises(DataError, match=r"x\.parquet: the column 'text' occurs twice"):
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


def test_parquet_gives_what_json_gives(tmp_path):
    """Arrow knows other types, and gives each object the keys of all others."""
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"zip": 3}}]
    dates = {"when": datetime.datetime(2024, 1, 2, 3, 4), "day": datetime.date(2024, 1, 2)}
    numbers = {"half": decimal.Decimal("0.5"), "one": decimal.Decimal("1.00"), "none": None}
    pq.write_table(pa.Table.from_pylist([{"calls": calls, **dates, **numbers}]), file := tmp_path / "x.parquet")
    (row,) = rows(local(file))
    assert row["calls"] == calls
    assert (row["when"], row["day"]) == ("2024-01-02T03:04:00", "2024-01-02")
    assert (row["half"], row["one"], type(row["one"]), row["none"]) == (0.5, 1, int, None)


@pytest.mark.parametrize(
    ("name", "content", "message", "remedy"),
    [
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
        ("x.csv", "prompt;completion\na;b\n", r"x\.csv: the columns are separated by ';', not by ','", "between"),
        ("x.csv", "a,b\n1,2\n1,\0\n", r"x\.csv:3: contains the character NUL", "iconv -f utf-16le"),
        ("x.txt", "a\n\nb".encode("utf-16-le"), r"x\.txt:1: contains the character NUL", "iconv -f utf-16le"),
        ("x.csv", "a,b,a\n1,2,3\n", r"x\.csv:1: the column 'a' occurs twice", "rename or remove"),
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
