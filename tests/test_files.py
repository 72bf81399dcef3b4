"""Files that cannot be written are named."""

from __future__ import annotations

import errno
import functools
import os
import time
from pathlib import Path

import pytest

from runner import files
from runner.errors import LaunchError


@pytest.mark.parametrize(
    ("number", "name", "is_refused"),
    [
        (errno.ENOSPC, None, True),
        (errno.EACCES, "mine/000/run.json", True),
        (errno.ENOTDIR, "", True),
        (errno.ENAMETOOLONG, "mine/000", True),
        (errno.EACCES, None, False),
        (errno.EACCES, "rows.py", False),
        (errno.ENOSPC, "elsewhere", False),
        (errno.EAGAIN, None, False),
        (errno.EPIPE, None, False),
        (errno.EIO, None, False),
        (errno.ENOENT, "mine/run.json", False),
        (None, None, False),
    ],
)
def test_only_errors_of_the_folder_are_turned_into_a_refusal(
    tmp_path: Path, number: int | None, name: str | None, is_refused: bool
):
    error = OSError("odd") if number is None else OSError(number, os.strerror(number))
    error.filename = None if name is None else str(tmp_path / name)
    with pytest.raises((OSError, LaunchError)) as caught, files.writing(tmp_path / "mine", LaunchError):
        raise error
    if is_refused:
        remedies = {errno.ENOSPC: "free disk space there", errno.ENAMETOOLONG: "use a shorter name"}
        remedy = remedies.get(error.errno or 0, "set outputs_dir to a folder that can be written")
        expected = f"outputs_dir={tmp_path}/mine: cannot be written: {error.strerror}\n    → {remedy}"
        assert str(caught.value).startswith(expected)
    else:
        assert caught.value is error


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_moves_with_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "c"))
    assert files.cache_dir("models") == tmp_path / "c" / "models"
    assert files.cache_dir("models").is_dir()


def test_after_a_failure_nothing_is_written_anymore() -> None:
    """A sweep removes what was written: nothing may be written afterwards."""
    begun, ended = [], []

    def task(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise OSError(28, "No space left on device")
        time.sleep(0.01 * (number > 3))
        ended.append(number)

    with pytest.raises(OSError, match="No space left"):
        files.at_once(functools.partial(task, number) for number in range(10_000))
    assert sorted(ended) == sorted({*begun} - {3})
    assert len(begun) < 10_000, "those that had not begun are left out"
