"""Find the data files of a path, a folder or a glob, and hash their content."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from runner.errors import DataError, Fault, suggest

MOST_FOLDERS = 10_000
"""Folders that are searched for data files; a whole disk has more."""
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


def find_files(key: str, path: str) -> list[Path]:
    """List the files of a path, folder or glob, sorted by name.

    ``key``: the config key to name in an error.

    Raises:
        DataError: no such file, or no file of a supported type.
    """
    try:
        return _find(key, path, Path(path).expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        where = getattr(error, "filename", None)
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}" + (f" ({where})" if where else "")
        raise DataError(Fault(key, problem, "correct the path, or its permissions", path)) from None


def _find(key: str, path: str, location: Path) -> list[Path]:
    if not path.strip():
        raise DataError(Fault(key, "is empty", "name a file or a folder; the current folder is .", path))
    if location.is_dir() or (glob.has_magic(path) and not location.exists()):
        pattern = os.path.join(glob.escape(str(location)), "**", "*") if location.is_dir() else str(location)
        names = dict.fromkeys(
            name for name in _expanded(key, pattern, itertools.count()) if Path(name).suffix.lower() in EXTENSIONS
        )
        files = [file for file in map(Path, sorted(names)) if not file.is_dir()]
        if not files:
            problem = f"contains no file of a supported type ({', '.join(EXTENSIONS)})"
            raise DataError(Fault(key, problem, "correct the path", path))
    elif location.is_symlink() and not location.exists():
        raise DataError(Fault(key, "is a link to nothing, or to itself", "correct the link", path))
    elif not location.exists():
        near = suggest(location.name, os.listdir(location.parent)) if location.parent.is_dir() else ""
        remedy = "correct the path; relative paths start at the current directory"
        raise DataError(Fault(key, f"no such file or folder. {near}".strip(" ."), remedy, path))
    elif location.suffix.lower() not in EXTENSIONS:
        near = suggest(location.suffix.lower(), EXTENSIONS)
        problem = " ".join(filter(None, ("unsupported file type.", near, f"supported: {', '.join(EXTENSIONS)}")))
        raise DataError(Fault(key, problem, "convert or rename the file", path))
    else:
        files = [location]
    for file in files:
        if not file.is_file():  # a pipe is waited for without end, a device never ends
            kind = "is no regular file (a pipe or a device)" if file.exists() else "is a link to nothing"
            remedy = "write the rows to a file, or remove it from the folder"
            raise DataError(Fault(key, f"{file} {kind}", remedy, path))
    return files


def _expanded(key: str, pattern: str, visits: Iterator[int]) -> Iterator[str]:
    """The paths of a glob pattern; unlike ``glob.glob``, folders that link to a folder above them are entered once.

    ``visits``: counts the folders.
    """
    head, stars, tail = pattern.partition(f"{os.sep}**{os.sep}")
    if pattern.startswith(f"**{os.sep}"):
        head, stars, tail = ".", os.sep, pattern[3:]
    if not stars:
        yield from glob.glob(pattern)
        return
    for base in glob.glob(head or os.sep):
        for folder in _folders(base, set()):
            if next(visits) >= MOST_FOLDERS:
                problem = f"has more than {MOST_FOLDERS:,} folders below {base}: too many to search for data"
                raise DataError(Fault(key, problem, "name the folder that contains the data, or its files"))
            yield from _expanded(key, os.path.join(glob.escape(os.path.normpath(folder)), tail), visits)


def _folders(folder: str, entered: set[str]) -> Iterator[str]:
    """The folder and all below it, hidden ones aside; a folder that is reached again is left out."""
    real = os.path.realpath(folder)
    if real in entered or not os.path.isdir(folder):
        return
    entered.add(real)
    yield folder
    for name in sorted(os.listdir(folder)):
        if not name.startswith("."):
            yield from _folders(os.path.join(folder, name), entered)


def digest(files: list[Path], note: str) -> str:
    """SHA-256 of the bytes and types of all files and of ``note``, 32 hex digits; independent of the files' paths."""
    total = hashlib.sha256(note.encode())
    for file in files:
        with readable(file), file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{file.suffix.lower()} {content}\n".encode())
    return total.hexdigest()[:32]


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn I/O and encoding errors during reading into a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        problem = f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})"
        raise DataError(Fault("", problem, "convert the file (iconv -t utf-8), or correct the path")) from None
    except OSError as error:
        problem = f"{file}: cannot be read: {error.strerror or error}"
        raise DataError(Fault("", problem, "correct the file's permissions, or the path")) from None
