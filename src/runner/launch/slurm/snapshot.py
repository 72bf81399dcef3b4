"""The code of a queued job, frozen when it was submitted: what is edited afterwards does not reach it.

A snapshot is a folder like an installed package, ``runner/`` with ``runner/conf/`` in it, that a job puts first on
Python's path. The user's own code is in the run folder already.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from runner import PACKAGE
from runner.config import bind


def take(home: Path) -> Path:
    """Freeze the code as it is now, uncommitted changes included.

    Returns:
        ``home/code/<digest>``, which is there already where nothing has changed since the last time.
    """
    files = dict(_code())
    content = {name: files[name].read_bytes() for name in sorted(files)}
    digest = hashlib.sha256()
    for name, text in content.items():
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    folder = home / "code" / digest.hexdigest()[:16]
    if not folder.is_dir():
        _write(folder, content)
    return folder


def _write(folder: Path, content: dict[str, bytes]) -> None:
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        for name, text in content.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        aside.rename(folder)
    except OSError:  # a full disk; or another submitter was faster: it wrote the same
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.is_dir():
            raise


def _code() -> Iterator[tuple[str, Path]]:
    """(name in the snapshot, file) of the package and its config groups."""
    conf = bind.config_dir()
    for top, folder in (("runner/conf", conf), ("runner", PACKAGE)):
        for file in _files(folder):
            if top == "runner" and file.is_relative_to(conf):
                continue  # in a wheel conf/ lies within the package
            yield f"{top}/{file.relative_to(folder)}", file


def _files(folder: Path) -> list[Path]:
    """What belongs to the code in a folder: in a checkout all that git does not ignore, else all but compiled files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        found = list(folder.rglob("*"))
    else:
        found = [folder / name for name in done.stdout.split("\0") if name]
        found = found or list(folder.rglob("*"))  # a repository that ignores it: an environment in somebody's project
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)
