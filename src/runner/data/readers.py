"""Read rows from json, jsonl, csv, tsv, parquet and txt files, and from folders and globs of such files.

Errors in a file are raised as DataError with the file name, and the line if known.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner.errors import DataError, Fault, suggest

Row = dict[str, Any]
Documents = Literal["file", "paragraph"]
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
    location = Path(path).expanduser()
    if location.is_dir() or (glob.has_magic(path) and not location.exists()):
        pattern = str(location / "**" / "*") if location.is_dir() else str(location)
        files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        files = [file for file in files if file.is_file() and file.suffix.lower() in EXTENSIONS]
        if not files:
            problem = f"contains no file of a supported type ({', '.join(EXTENSIONS)})"
            raise DataError(Fault(key, problem, "correct the path", path))
        return files
    if not location.exists():
        near = suggest(location.name, os.listdir(location.parent)) if location.parent.is_dir() else ""
        remedy = "correct the path; relative paths start at the current directory"
        raise DataError(Fault(key, f"no such file or folder. {near}".strip(), remedy, path))
    if location.suffix.lower() not in EXTENSIONS:
        near = suggest(location.suffix.lower(), EXTENSIONS)
        problem = f"unsupported file type. {near} supported: {', '.join(EXTENSIONS)}"
        raise DataError(Fault(key, problem, "convert or rename the file", path))
    return [location]


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
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        is_lines = error.msg == "Extra data" and text.lstrip().startswith("{")
        remedy = "rename the file to .jsonl: it contains one object per line" if is_lines else ""
        raise _malformed(file, error.lineno, error, remedy) from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield Place(str(file), number, "row"), row


def _read_json_lines(file: Path) -> Iterator[tuple[Place, Any]]:
    name = str(file)
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                yield Place(name, number), json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                is_list = number == 1 and line.startswith("[")
                remedy = "rename the file to .json: it contains one list over several lines" if is_list else ""
                raise _malformed(file, number, error, remedy) from None


def _malformed(file: Path, line: int, error: json.JSONDecodeError, remedy: str) -> DataError:
    problem = f"{file}:{line}: malformed JSON: {error.msg} (column {error.colno})"
    return DataError(Fault("", problem, remedy or "correct that line"))


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for documents
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
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
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=4096)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Place(str(file), number, "row"), row
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        problem = f"{file}: damaged or not a parquet file: {reason}"
        raise DataError(Fault("", problem, "write or download the file again")) from None


def _read_text(file: Path, documents: Documents) -> Iterator[tuple[Place, Row]]:
    text = file.read_text(encoding="utf-8-sig")
    if documents == "file":
        if text.strip():
            yield Place(str(file), 1), {"text": text.strip()}
        return
    start, paragraph = 1, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], start=1):
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
