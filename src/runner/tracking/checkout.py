"""The git checkout of this project: current commit and uncommitted changes, diffs, and worktrees for old commits.

A ``Code`` is a commit with the uncommitted changes on top of it, as a patch for ``git apply``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner import PACKAGE
from runner.errors import ConfigError, Fault
from runner.secrets import redact

HERE = PACKAGE
TIMEOUT_S = 60
_PLAIN = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
"""Options of ``git diff`` that give the same format with any git configuration of the user."""
_HOOK_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
"""Environment variables that git sets for hooks; they would point a run started by a hook to another repository."""


@dataclass(frozen=True)
class Code:
    """A commit and the uncommitted changes on top of it."""

    sha: str
    patch: str = ""


@dataclass(frozen=True)
class Changed:
    """A file that differs between two codes, with numbers of added and removed lines (None for a binary file)."""

    file: str
    added: int | None
    removed: int | None

    def __str__(self) -> str:
        return f"{self.file}  " + ("binary" if self.added is None else f"+{self.added} -{self.removed}")


@functools.cache
def current() -> Code | None:
    """The code that this process runs, including untracked source files; None without git or a checkout. Cached."""
    sha = _try("rev-parse", "HEAD")
    if sha is None or (top := top_folder()) is None:
        return None
    patch = _try(*_PLAIN, "--binary", "HEAD", cwd=top) or ""
    return Code(sha.strip(), patch + _new_files(top))


def note(code: Code | None) -> tuple[dict[str, object], str]:
    """(entry for the manifest: {sha, dirty, diff_sha256, redacted}, patch without secrets)."""
    if code is None:
        return {"sha": None, "dirty": None}, ""
    kept = redact(code.patch)
    digest = hashlib.sha256(code.patch.encode("utf-8", "surrogateescape")).hexdigest()
    more = {"diff_sha256": digest, "redacted": kept != code.patch} if code.patch else {}
    return {"sha": code.sha, "dirty": bool(code.patch), **more}, kept


@functools.cache
def note_of_current() -> tuple[dict[str, object], str]:
    """The ``note`` of the code that this process runs. Cached."""
    return note(current())


@functools.cache
def repository(folder: Path) -> dict[str, object]:
    """The git repository that contains ``folder``: {top, sha, dirty, diff_sha256}; empty for none or this project's.

    Untracked files do not count as changes. Cached.
    """
    top = _try("rev-parse", "--show-toplevel", cwd=folder)
    sha = _try("rev-parse", "HEAD", cwd=folder)
    if top is None or sha is None or Path(top.strip()) == top_folder():
        return {}
    patch = _try(*_PLAIN, "--binary", "HEAD", cwd=Path(top.strip())) or ""
    return {"top": top.strip(), **note(Code(sha.strip(), patch))[0]}


def repositories(paths: Iterable[Path]) -> list[dict[str, object]]:
    """The git repositories of the user: of the current folder, and of the user's own code, each once."""
    folders = [Path.cwd(), *(path if path.is_dir() else path.parent for path in paths)]
    every = (repository(folder) for folder in folders if folder.is_dir())
    return list({str(each["top"]): each for each in every if each}.values())


def top_folder() -> Path | None:
    """Top folder of this project's checkout; None if the package is installed inside another repository."""
    top = _try("rev-parse", "--show-toplevel")
    return Path(top.strip()) if top and _try("ls-files", "--error-unmatch", "errors.py") is not None else None


def has(sha: str) -> bool:
    """Whether the commit is in this checkout's repository."""
    return _try("cat-file", "-e", f"{sha}^{{commit}}") is not None


def between(ours: Code, theirs: Code) -> list[Changed]:
    """The files that differ between two codes, including uncommitted changes.

    Raises:
        ConfigError: a commit is not in this repository, or a patch does not apply.
    """
    with _trees(ours, theirs) as (first, second, environment):
        table = _git(*_PLAIN, "--numstat", "-z", first, second, environment=environment)
    rows = [row.split("\t", 2) for row in table.split("\0") if row]
    return [Changed(file, *(None if n == "-" else int(n) for n in (added, removed))) for added, removed, file in rows]


def patch_between(ours: Code, theirs: Code) -> str:
    """The differing lines, as printed by git diff."""
    with _trees(ours, theirs) as (first, second, environment):
        return _git(*_PLAIN, first, second, environment=environment)


def refuse_unknown(sha: str | None) -> Path:
    """Top folder of this checkout; its repository contains the commit.

    Raises:
        ConfigError: no git, no checkout, no recorded commit, or the commit is not in the repository.
    """
    if not sha:
        problem = "no commit is recorded for this run: it was not started from a git checkout"
        raise ConfigError(Fault("--exact", problem, "omit --exact to run with the current code"))
    if _try("--version") is None:
        raise ConfigError(Fault("--exact", "needs git, which is not installed", "install git, or omit --exact"))
    top = top_folder()
    if top is None:
        problem = f"this runner is not in a git checkout ({HERE})"
        raise ConfigError(Fault("--exact", problem, "start runner from a clone of the project, or omit --exact"))
    if not has(sha):
        remedy = "fetch it (git fetch --all), or use the clone from which the run was started"
        raise ConfigError(Fault("--exact", f"the commit {sha} is not in {top}", remedy))
    return top


def add_worktree(code: Code, folder: Path) -> None:
    """Check out the code, with its patch applied, as a git worktree in ``folder``.

    Raises:
        ConfigError: git fails; contains git's message.
    """
    top = refuse_unknown(code.sha)
    try:
        # --force: git may still list a worktree of the same name whose folder was removed.
        _git("worktree", "add", "--force", "--detach", str(folder), code.sha, cwd=top)
        if code.patch:
            _git("apply", "--whitespace=nowarn", "-", cwd=folder, stdin=code.patch)
    except subprocess.CalledProcessError as error:
        remove_worktree(folder)
        what = "the recorded uncommitted changes do not apply" if "apply" in error.cmd else "git worktree add failed"
        problem = f"{what} (commit {code.sha[:12]}): {_stderr(error)}"
        raise ConfigError(Fault("--exact", problem, "omit --exact to run with the current code")) from error


def remove_worktree(folder: Path) -> None:
    """Remove a worktree created by ``add_worktree``."""
    _try("worktree", "remove", "--force", "--force", str(folder))


@contextmanager
def _trees(*codes: Code) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Write two codes as git trees into a temporary object store; yields both tree ids and the environment for git."""
    objects = _try("rev-parse", "--git-path", "objects")
    if objects is None:
        raise ConfigError(Fault("", "not a git checkout"))
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:
        environment = {
            "GIT_OBJECT_DIRECTORY": folder,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str((HERE / objects.strip()).resolve()),
            "GIT_INDEX_FILE": str(Path(folder, "index")),
        }
        first, second = (_tree(code, environment) for code in codes)
        yield first, second, environment


def _tree(code: Code, environment: Mapping[str, str]) -> str:
    if not has(code.sha):
        raise ConfigError(Fault("", f"the commit {code.sha[:12]} is not in this checkout", "git fetch --all"))
    try:
        _git("read-tree", code.sha, environment=environment)
        if code.patch:
            _git("apply", "--cached", "--whitespace=nowarn", "-", environment=environment, stdin=code.patch,
                 cwd=top_folder() or HERE)  # fmt: skip
        return _git("write-tree", environment=environment).strip()
    except subprocess.CalledProcessError as error:
        problem = f"the recorded uncommitted changes do not apply (commit {code.sha[:12]}): {_stderr(error)}"
        raise ConfigError(Fault("", problem)) from error


def _new_files(top: Path) -> str:
    """A patch that adds the untracked files in src and conf."""
    untracked = _try("ls-files", "-z", "--others", "--exclude-standard", "--", "src", "conf", cwd=top) or ""
    if not (names := [name for name in untracked.split("\0") if name]):
        return ""
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:  # do not change the user's index
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        _try("add", "--intent-to-add", "--", *names, cwd=top, environment=index)
        return _try(*_PLAIN, "--binary", "--", *names, cwd=top, environment=index) or ""


def _try(*arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """Output of git; None if it fails."""
    try:
        return _git(*arguments, cwd=cwd, environment=environment)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None, stdin: str | None = None
) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in _HOOK_VARIABLES}
    result = subprocess.run(
        ["git", *arguments],
        cwd=cwd or HERE,
        env={**inherited, "LC_ALL": "C", **(environment or {})},
        input=stdin.encode("utf-8", "surrogateescape") if stdin is not None else None,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return result.stdout.decode("utf-8", "surrogateescape")


def _stderr(error: subprocess.CalledProcessError) -> str:
    return " ".join(bytes(error.stderr or b"").decode(errors="replace").split())[:300] or str(error)
