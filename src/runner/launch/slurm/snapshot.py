"""Snapshot of the code at submission: later edits do not change queued jobs.

A snapshot has the layout of the installed package, ``runner/`` with ``runner/conf/``; the job puts it first on
PYTHONPATH. The user's own code is in the run folder already.
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
    """Copy the current code, with uncommitted changes.

    Returns:
        ``home/code/<digest>``; the existing folder if nothing has changed.
    """
    files = dict(_code())
    content = {name: files[name].read_bytes() for name in sorted(files)}
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    folder = home / "code" / digest.hexdigest()[:16]
    if not folder.is_dir():
        _write(folder, content)
    return folder


def _write(folder: Path, content: dict[str, bytes]) -> None:
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        for name, data in content.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        temporary.rename(folder)
    except OSError:  # a full disk; or another process has written the same snapshot
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise


def _code() -> Iterator[tuple[str, Path]]:
    """(name in the snapshot, file) for the package and conf/."""
    conf = bind.config_dir()
    for top, folder in (("runner/conf", conf), ("runner", PACKAGE)):
        for file in _files(folder):
            if top == "runner" and file.is_relative_to(conf):
                continue  # a wheel contains conf/ inside the package
            yield f"{top}/{file.relative_to(folder)}", file


def _files(folder: Path) -> list[Path]:
    """Code files in a folder: in a git checkout all files that git does not ignore, else all but ``__pycache__``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    # git lists nothing if the folder is ignored: a virtual environment in another project's checkout
    paths = [folder / name for name in listed.split("\0") if name] or folder.rglob("*")
    return sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts)
