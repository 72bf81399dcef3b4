"""Snapshot of the code at submission: later edits do not change queued jobs.

A snapshot has the layout of the installed package, ``runner/`` with ``runner/conf/``; the job puts it first on
PYTHONPATH. ``functions/`` contains the user's own files that the configuration names, and the modules that these
files import from their folder.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from runner import PACKAGE
from runner.config import bind
from runner.data import formats
from runner.data.user_code import imported
from runner.tracking.manifest import read_config
from runner.tracking.rundir import RunDir


def take(home: Path, rundirs: Iterable[RunDir]) -> Path:
    """Copy the current code, with uncommitted changes, and the user's functions of these runs.

    Returns:
        ``home/code/<digest>``; the existing folder if nothing has changed.
    """
    files = {**dict(_code()), **dict(_functions(rundirs))}
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


def _functions(rundirs: Iterable[RunDir]) -> Iterator[tuple[str, Path]]:
    """Files of the user's functions (``data.format.function=FILE.py:name``), and modules imported from beside them."""
    for rundir in rundirs:
        format = read_config(rundir)["data"].get("format") or {}
        name = str(format.get("function") or "").rpartition(":")[0]
        file = Path(name).expanduser()
        if name.endswith(".py") and file.is_file():
            yield from ((formats.frozen_name(file, part), part) for part in (file, *imported(file)))
