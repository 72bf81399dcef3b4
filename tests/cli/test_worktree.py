"""A worktree of the code of an earlier run."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
from pathlib import Path

from fixtures.clones import _in_a_new_folder

from runner.cli import worktree


def test_what_is_noted_beside_a_worktree_goes_with_it(tmp_path: Path):
    (tmp_path / "there").mkdir()
    for name in ("there", "gone"):
        for suffix in ("lock", "sha256"):
            (tmp_path / f".{name}.{suffix}").touch()
    worktree._remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5, "a process may be about to make it"
    for path in tmp_path.glob(".*"):
        os.utime(path, (1, 1))
    worktree._remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".there.lock", ".there.sha256", "there"]
