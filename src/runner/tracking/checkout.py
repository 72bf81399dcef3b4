"""The project's git checkout: which commit, what is not committed, what lies between two codes, and a copy of one.

A *code* is a commit and the uncommitted changes on top of it, as a patch that ``git apply`` takes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner import PACKAGE
from runner.errors import ConfigError, Fault
from runner.secrets import redact

HERE = PACKAGE
TIMEOUT_S = 60
_PLAIN = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
"""Whatever the user's own git is configured to show."""
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
"""What git sets for its hooks: a run that a hook starts would be told of another repository."""


@dataclass(frozen=True)
class Code:
    """A commit, and the changes on top of it."""

    sha: str
    patch: str = ""


@dataclass(frozen=True)
class Changed:
    """A file that two codes differ in, with the number of lines; None for a binary one."""

    file: str
    added: int | None
    removed: int | None

    def __str__(self) -> str:
        return f"{self.file}  " + ("binary" if self.added is None else f"+{self.added} -{self.removed}")


@functools.cache
def current() -> Code | None:
    """The code of the checkout that this process runs from, new files of the program included; asked once a process.

    None where there is no git, or no checkout.
    """
    sha = _try("rev-parse", "HEAD")
    if sha is None or (top := top_folder()) is None:
        return None
    patch = _try(*_PLAIN, "--binary", "HEAD", cwd=top) or ""
    return Code(sha.strip(), patch + _new_files(top))


def note(code: Code | None) -> tuple[dict[str, object], str]:
    """What is written down of a code: {sha, dirty, diff_sha256, redacted}, and the patch without secrets."""
    if code is None:
        return {"sha": None, "dirty": None}, ""
    kept = redact(code.patch)
    digest = hashlib.sha256(code.patch.encode("utf-8", "surrogateescape")).hexdigest()
    more = {"diff_sha256": digest, "redacted": kept != code.patch} if code.patch else {}
    return {"sha": code.sha, "dirty": bool(code.patch), **more}, kept


def top_folder() -> Path | None:
    """The top of the checkout that this process runs from; None if that is somebody else's, around an environment."""
    top = _try("rev-parse", "--show-toplevel")
    return Path(top.strip()) if top and _try("ls-files", "--error-unmatch", "errors.py") is not None else None


def has(sha: str) -> bool:
    """Whether the commit is in this checkout's repository."""
    return _try("cat-file", "-e", f"{sha}^{{commit}}") is not None


def between(ours: Code, theirs: Code) -> list[Changed]:
    """The files that differ between two codes, uncommitted changes included.

    Raises:
        ConfigError: git cannot say: one of the commits is not here, or its patch does not apply.
    """
    with _trees(ours, theirs) as (first, second, environment):
        table = _git(*_PLAIN, "--numstat", "-z", first, second, environment=environment)
    rows = [row.split("\t", 2) for row in table.split("\0") if row]
    return [Changed(file, *(None if n == "-" else int(n) for n in (added, removed))) for added, removed, file in rows]


def patch_between(ours: Code, theirs: Code) -> str:
    """The lines that differ, as git shows them.

    Raises:
        ConfigError: as ``between``.
    """
    with _trees(ours, theirs) as (first, second, environment):
        return _git(*_PLAIN, first, second, environment=environment)


def refuse_unknown(sha: str | None) -> Path:
    """The top of this checkout, whose repository has the commit.

    Raises:
        ConfigError: there is no git, no checkout, no commit recorded, or this one is not there.
    """
    if not sha:
        problem = "the run does not say which commit it ran: it was not started from a git checkout"
        raise ConfigError(Fault("--exact", problem, "leave --exact out: it runs with the code that is here"))
    if _try("--version") is None:
        raise ConfigError(Fault("--exact", "needs git, and there is none here", "install git, or leave --exact out"))
    top = top_folder()
    if top is None:
        problem = f"runner is not started from a git checkout here ({HERE})"
        raise ConfigError(Fault("--exact", problem, "clone the project and start it there, or leave --exact out"))
    if not has(sha):
        remedy = "fetch it (git fetch --all), or use the clone that the run was started from"
        raise ConfigError(Fault("--exact", f"the commit {sha} is not in {top}", remedy))
    return top


def add_worktree(code: Code, folder: Path) -> None:
    """Check the code out into ``folder``, a worktree of this repository, with its patch applied.

    Raises:
        ConfigError: git cannot: with its own words.
    """
    top = refuse_unknown(code.sha)
    try:
        # Forced, for a folder of the same name that somebody has removed without telling git.
        _git("worktree", "add", "--force", "--detach", str(folder), code.sha, cwd=top)
        if code.patch:
            _git("apply", "--whitespace=nowarn", "-", cwd=folder, given=code.patch)
    except subprocess.CalledProcessError as error:
        remove_worktree(folder)
        what = "the recorded uncommitted changes do not apply" if "apply" in error.cmd else "git makes no worktree"
        remedy = "leave --exact out: it runs with the code that is here"
        raise ConfigError(Fault("--exact", f"{what} of {code.sha[:12]}: {_words(error)}", remedy)) from error


def remove_worktree(folder: Path) -> None:
    """Take a worktree that ``add_worktree`` made away again."""
    _try("worktree", "remove", "--force", "--force", str(folder))


@contextmanager
def _trees(*codes: Code) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """The trees of two codes and the environment in which git finds them; the repository stays as it was."""
    objects = _try("rev-parse", "--git-path", "objects")
    if objects is None:
        raise ConfigError(Fault("", "there is no git checkout here"))
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
            _git("apply", "--cached", "--whitespace=nowarn", "-", environment=environment, given=code.patch,
                 cwd=top_folder() or HERE)  # fmt: skip
        return _git("write-tree", environment=environment).strip()
    except subprocess.CalledProcessError as error:
        problem = f"the recorded uncommitted changes on {code.sha[:12]} cannot be read: {_words(error)}"
        raise ConfigError(Fault("", problem)) from error


def _new_files(top: Path) -> str:
    """The patch that makes those files of the program which git does not know yet."""
    listed = _try("ls-files", "-z", "--others", "--exclude-standard", "--", "src", "conf", cwd=top) or ""
    if not (names := [name for name in listed.split("\0") if name]):
        return ""
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:  # the user's index stays as it is
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        _try("add", "--intent-to-add", "--", *names, cwd=top, environment=index)
        return _try(*_PLAIN, "--binary", "--", *names, cwd=top, environment=index) or ""


def _try(*arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str | None:
    """What git says; None where it cannot."""
    try:
        return _git(*arguments, cwd=cwd, environment=environment)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None, given: str | None = None
) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    done = subprocess.run(
        ["git", *arguments],
        cwd=cwd or HERE,
        env={**inherited, "LC_ALL": "C", **(environment or {})},
        input=given.encode("utf-8", "surrogateescape") if given is not None else None,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout.decode("utf-8", "surrogateescape")


def _words(error: subprocess.CalledProcessError) -> str:
    return " ".join(bytes(error.stderr or b"").decode(errors="replace").split())[:300] or str(error)
