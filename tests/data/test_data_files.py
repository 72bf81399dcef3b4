"""Files are looked for in folders and globs; what cannot be read is refused at once."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.data_files import ROWS, folder, local, places, rows, write

from runner.data import data_files
from runner.errors import DataError


def test_a_folder_is_entered_once_however_often_it_is_linked(folder):
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    (folder / "deep" / "here").symlink_to(folder / "deep")
    assert rows(local(folder)) == ROWS * 6
    assert rows(local(folder / "**" / "*.json")) == ROWS * 2
    assert rows(local(folder / "**" / "deep" / "*.parquet")) == ROWS


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "*/**/*.jsonl"])
def test_a_whole_disk_is_not_searched(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MOST_FOLDERS", 4)
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    write(tmp_path / "a" / "b" / "x.jsonl", "{}")
    assert data_files.find_files("data.path", f"{tmp_path}/a/{pattern}")
    (tmp_path / "a" / "e").mkdir()
    (tmp_path / "a" / "b" / "f").mkdir()
    with pytest.raises(DataError, match=r"data\.path: has more than 4 folders below /.*: too many to search for data"):
        data_files.find_files("data.path", f"{tmp_path}/{pattern}")


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
    with pytest.raises(DataError, match=r"is a link to nothing, or to itself"):
        local(tmp_path / "gone.txt")


@pytest.mark.parametrize("path", ["", " ", "~nobody-of-this-name/x.jsonl", "a" * 5000 + ".jsonl", "x\0.jsonl"])
def test_paths_that_cannot_be(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        local(path)
    assert caught.value.faults[0].key == "data.path"


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
