"""Read rows from json, jsonl, csv, tsv, parquet and txt files, and from folders and globs of such files.

Errors in a file are raised as DataError with the file name, and the line if known.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner.errors import DataError, Fault, quoted, suggest

Row = dict[str, Any]
Documents = Literal["file", "paragraph"]
_TOKENS = re.compile(r'(?P<text>"(?:[^"\\]|\\.)*")(?P<colon>\s*:)?|[\[\]{}]')
MOST_FOLDERS = 10_000
"""Folders that are searched for data files; a whole disk has more."""
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


class Place(NamedTuple):
    """The position of a row in its file, for error messages."""

    file: str
    number: int
    """Starts at 1."""
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}, row {self.number}"


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
    elif not location.exists():
        near = suggest(location.name, os.listdir(location.parent)) if location.parent.is_dir() else ""
        remedy = "correct the path; relative paths start at the current directory"
        raise DataError(Fault(key, f"no such file or folder. {near}".strip(), remedy, path))
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
        with _readable(file), file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{file.suffix.lower()} {content}\n".encode())
    return total.hexdigest()[:32]


def read(files: list[Path], documents: Documents) -> Iterator[tuple[Place, Row]]:
    """Yield every row of the files with its position; ``documents``: whether a txt file or a paragraph is a row."""
    for file in files:
        empty = True
        with _readable(file):
            for place, row in _read_file(file, documents):
                if not isinstance(row, dict):
                    problem = f"{place}: a row must be a JSON object, not {type(row).__name__}"
                    raise DataError(Fault("", problem, 'write for example {"messages": […]} or {"text": "…"}'))
                empty = False
                yield place, row
        if empty:
            raise DataError(Fault("", f"{file}: contains no rows", "add rows, or remove the file"))


def _read_file(file: Path, documents: Documents) -> Iterator[tuple[Place, Any]]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(file)
    if kind in (".csv", ".tsv"):
        return _read_table(file, "," if kind == ".csv" else "\t")
    if kind == ".txt":
        return _read_text(file, documents)
    return _read_json(file) if kind == ".json" else _read_json_lines(file)


def _read_json(file: Path) -> Iterator[tuple[Place, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    is_lines = text.lstrip().startswith("{")
    content = _parse(file, text, "rename the file to .jsonl: it contains one object per line" if is_lines else "")
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield Place(str(file), number, "row"), row


def _read_json_lines(file: Path) -> Iterator[tuple[Place, Any]]:
    name = str(file)
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                is_list = number == 1 and line.startswith("[")
                remedy = "rename the file to .json: it contains one list over several lines" if is_list else ""
                yield Place(name, number), _parse(file, line.rstrip(), remedy, number)


def _parse(file: Path, text: str, remedy: str, line: int | None = None) -> Any:
    """JSON as Python values. ``remedy`` for a text that goes on after its end, or that is one list over several lines;
    ``line``: where it stands, if it is one line.

    Raises:
        DataError: malformed, a key that stands twice, or a number or nesting that Python does not read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        if line is None and error.msg != "Extra data":
            remedy = ""
        problem, at = f"malformed JSON: {error.msg} (column {error.colno})", error.pos
    except RecursionError:
        problem, at, remedy = "lists or objects are nested too deep", _deepest(text), "write the values less deep"
    except ValueError as error:
        remedy = "correct that line"
        if isinstance(error, _RepeatedKeyError):
            problem, at = f"the key {quoted(error.args[0])} stands twice in one object", _repeated(text)
        else:
            match = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1},}}", text)
            problem, at = "a number has too many digits", match.start() if match else 0
            remedy = "write it as a text"
    where = line or text.count("\n", 0, at) + 1
    raise DataError(Fault("", f"{file}:{where}: {problem}", remedy or "correct that line")) from None


class _RepeatedKeyError(ValueError):
    """A key stands twice in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return row


def _deepest(text: str) -> int:
    """The position of the most deeply nested bracket."""
    depth, best, at = 0, 0, 0
    for token in _TOKENS.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > best:
            best, at = depth, token.start()
    return at


def _repeated(text: str) -> int:
    """The position of the first key that stands twice in its object."""
    objects: list[set[str]] = []
    for token in _TOKENS.finditer(text):
        if token[0] in "[{":
            objects.append(set())
        elif token[0] in "]}":
            objects.pop()
        elif token["colon"]:
            key = json.loads(token["text"])
            if key in objects[-1]:
                return token.start()
            objects[-1].add(key)
    return 0


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for documents
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if names.count(name) > 1), None):
                problem = f"{file}:{reader.line_num}: the column {quoted(twice)} stands twice"
                raise DataError(Fault("", problem, "rename or remove one of them"))
            for row in reader:
                if None in row or None in row.values():
                    columns = ", ".join(reader.fieldnames or ())
                    problem = f"{file}:{reader.line_num}: number of values differs from number of columns ({columns})"
                    raise DataError(Fault("", problem, 'correct that line; quote values that contain commas or "'))
                yield Place(str(file), reader.line_num), row
        except csv.Error as error:
            problem = f"{file}:{reader.line_num + 1}: malformed table: {error}, in the row that starts at this line"
            raise DataError(Fault("", problem, "correct that line")) from None


def _read_parquet(file: Path) -> Iterator[tuple[Place, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            problem = f"{file}: the column {quoted(twice)} stands twice"
            raise DataError(Fault("", problem, "rename or remove one of them"))
        rows = (row for batch in table.iter_batches(batch_size=4096) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Place(str(file), number, "row"), row
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if getattr(error, "errno", None):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problem = f"{file}: damaged or not a parquet file: {reason}"
        raise DataError(Fault("", problem, "write or download the file again")) from None


def _read_text(file: Path, documents: Documents) -> Iterator[tuple[Place, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as handle:
        text = handle.read().replace("\r\n", "\n")
    if documents == "file":
        if text.strip():
            yield Place(str(file), 1), {"text": text.strip()}
        return
    start, paragraph = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Place(str(file), start), {"text": "\n".join(paragraph)}
            paragraph.clear()


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn I/O and encoding errors during reading into a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        problem = f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})"
        raise DataError(Fault("", problem, "convert the file (iconv -t utf-8), or correct the path")) from None
    except OSError as error:
        problem = f"{file}: cannot be read: {error.strerror or error}"
        raise DataError(Fault("", problem, "correct the file's permissions, or the path")) from None
