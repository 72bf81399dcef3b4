"""What git says of the code."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.clones import _in_a_new_folder, git, runner

from runner.errors import ConfigError
from runner.tracking import checkout

# --- what git and the files say ---------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small checkout that stands in for the project's."""
    package = tmp_path / "checkout" / "src" / "runner"
    package.mkdir(parents=True)
    (package / "errors.py").write_text("first = 1\n")
    (package / "binary.bin").write_bytes(bytes(range(256)))
    top = package.parents[1]
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "first")
    monkeypatch.setattr(checkout, "HERE", package)
    checkout.current.cache_clear()
    yield top
    checkout.current.cache_clear()


def test_a_code_is_a_commit_and_what_is_not_committed(repository: Path, tmp_path: Path):
    package = repository / "src" / "runner"
    clean = checkout.current()
    assert clean == checkout.Code(git(repository, "rev-parse", "HEAD"))
    assert checkout.note(clean) == ({"sha": clean.sha, "dirty": False}, "")

    (package / "errors.py").write_text("first = 2\ntoken = 'hf_abcdefghijklmnop12'\n")
    (package / "binary.bin").write_bytes(b"\0\1")
    (package / "a new one.py").write_bytes("é = 'caf\xe9'\n".encode("latin-1"))
    (repository / "notes.txt").write_text("not of the program")
    git(repository, "config", "diff.noprefix", "true")
    git(repository, "config", "color.ui", "always")
    status = git(repository, "status", "--porcelain")
    checkout.current.cache_clear()
    dirty = checkout.current()
    noted, kept = checkout.note(dirty)
    assert (noted["dirty"], noted["redacted"]) == (True, True)
    assert "hf_" not in kept
    assert "notes.txt" not in kept
    assert git(repository, "status", "--porcelain") == status, "the user's index is as it was"

    changed = {each.file: (each.added, each.removed) for each in checkout.between(clean, dirty)}
    assert changed == {
        "src/runner/errors.py": (2, 1), "src/runner/binary.bin": (None, None), "src/runner/a new one.py": (1, 0),
    }  # fmt: skip
    assert "+first = 2\n" in checkout.patch_between(clean, dirty)
    assert checkout.between(dirty, dirty) == []
    with pytest.raises(ConfigError, match="is not in this checkout"):
        checkout.between(clean, checkout.Code("0" * 40))

    checkout.add_worktree(dirty, tmp_path / "copy")
    for file in package.iterdir():
        assert (tmp_path / "copy" / "src" / "runner" / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(tmp_path / "copy")
    checkout.add_worktree(clean, tmp_path / "copy")  # although git still knows of the one that was removed
    assert (tmp_path / "copy" / "src" / "runner" / "errors.py").read_text() == "first = 1\n"
    checkout.remove_worktree(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_somebody_elses_checkout_around_an_environment_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "venv" / "runner"
    package.mkdir(parents=True)
    (package / "errors.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    monkeypatch.setattr(checkout, "HERE", package)
    assert checkout.top_folder() is None
