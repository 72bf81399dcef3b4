"""Snapshot of the code at submission: later edits do not change queued jobs.

A snapshot has the layout of the installed package, ``runner/`` with ``runner/conf/``; the job puts it first on
PYTHONPATH. The user's own code is in the run folder already.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from runner import PACKAGE
from runner.config import bind
from runner.errors import Fault, LaunchError
from runner.files import cache_dir


def take(home: Path) -> Path:
    """Copy the current code, with uncommitted changes.

    Returns:
        ``home/code/<digest>``; the existing folder if nothing has changed.
    """
    files = dict(_code())
    content = {name: files[name].read_bytes() for name in sorted(files)}
    folder = home / "code" / _digest(content)
    if not folder.is_dir():
        _write(folder, content)
    return folder


def importable(folder: Path) -> Path:
    """The snapshot's folder for PYTHONPATH, which cannot hold a ``:``; then it is a link in the user's cache.

    Raises:
        LaunchError: the path of the cache contains ``:`` as well.
    """
    if os.pathsep not in str(folder):
        return folder
    link = cache_dir("snapshots").absolute() / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    if os.pathsep in str(link):
        problem = f"PYTHONPATH cannot contain the code's snapshot: '{os.pathsep}' in its path and in that of the cache"
        remedy = "set the environment variable RUNNER_CACHE to another folder, or launcher.snapshot=none"
        raise LaunchError(Fault("RUNNER_CACHE", problem, remedy, link.parent))
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    return link


def mismatch(folder: Path) -> str:
    """Why this process does not run the code of the snapshot; empty if it does."""
    if not (folder / "runner").is_dir():
        return f"the snapshot of the code was removed: {folder}"
    if not PACKAGE.samefile(folder / "runner"):
        return (
            f"the job runs {PACKAGE} instead of the snapshot {folder}: PYTHONPATH does not reach it; check "
            "launcher.python, launcher.container and launcher.srun_args, or set launcher.snapshot=none"
        )
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if _is_code(path)}
    if _digest({name: path.read_bytes() for name, path in files.items()}) != folder.name:
        return f"the snapshot of the code was changed: {folder}; launcher.snapshot=new takes the current code"
    return ""


def _digest(content: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(content):
        digest.update(f"{name}\0{len(content[name])}\0".encode() + content[name])
    return digest.hexdigest()[:16]


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
    return sorted(path for path in paths if _is_code(path))


def _is_code(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".nfs")
