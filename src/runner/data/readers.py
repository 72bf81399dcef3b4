"""Rows out of files: json, jsonl, csv, tsv, parquet, txt, and folders and globs of them.

Every fault of a file is a DataError that names it, and the line where there is one.
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
    """Where a row stands, for the message that has to name it."""

    file: str
    number: int
    """Counted from 1."""
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}, row {self.number}"


def find_files(key: str, path: str) -> list[Path]:
    """The files that a path, folder or glob stands for, in a stable order.

    Raises:
        DataError: written from ``key``; nothing there, or nothing that is read here.
    """
    found = Path(path).expanduser()
    if found.is_dir() or (glob.has_magic(path) and not found.exists()):
        pattern = str(found / "**" / "*") if found.is_dir() else str(found)
        files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        files = [file for file in files if file.is_file() and file.suffix.lower() in EXTENSIONS]
        if not files:
            problem = f"holds no file that can be read (allowed: {', '.join(EXTENSIONS)})"
            raise DataError(Fault(key, problem, "correct the path", path))
        return files
    if not found.exists():
        near = suggest(found.name, os.listdir(found.parent)) if found.parent.is_dir() else ""
        remedy = "correct the path; a relative one starts at the current directory"
        raise DataError(Fault(key, f"no such file or folder. {near}".strip(), remedy, path))
    if found.suffix.lower() not in EXTENSIONS:
        near = suggest(found.suffix.lower(), EXTENSIONS)
        problem = f"is of no kind that is read here. {near} allowed: {', '.join(EXTENSIONS)}"
        raise DataError(Fault(key, problem, "convert or rename it", path))
    return [found]


def digest(files: list[Path], note: str) -> str:
    """SHA-256 over the bytes and kinds of all files and the note, 32 digits; a file that moves keeps it."""
    total = hashlib.sha256(note.encode())
    for file in files:
        with _readable(file), file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{file.suffix.lower()} {content}\n".encode())
    return total.hexdigest()[:32]


def read(files: list[Path], documents: Documents) -> Iterator[tuple[Place, Row]]:
    """Every row of the files with its place; ``documents`` says what a row of a txt file is."""
    for file in files:
        empty = True
        with _readable(file):
            for place, row in _read_file(file, documents):
                if not isinstance(row, dict):
                    problem = f"{place}: a row must be an object with named values, not {type(row).__name__}"
                    raise DataError(Fault("", problem, 'write {"messages": […]}, {"text": "…"} or the like'))
                empty = False
                yield place, row
        if empty:
            raise DataError(Fault("", f"{file}: is empty", "fill it, or leave it out of the path"))


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
        remedy = "name it .jsonl: it holds one object a line" if is_lines else ""
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
                remedy = "name it .json: it holds one list over several lines" if is_list else ""
                raise _malformed(file, number, error, remedy) from None


def _malformed(file: Path, line: int, error: json.JSONDecodeError, remedy: str) -> DataError:
    problem = f"{file}:{line}: malformed JSON: {error.msg} (column {error.colno})"
    return DataError(Fault("", problem, remedy or "correct that line"))


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = ", ".join(reader.fieldnames or ())
                    problem = f"{file}:{reader.line_num}: has not as many values as there are columns ({columns})"
                    raise DataError(Fault("", problem, 'correct that line; quote values that hold commas or quotes "'))
                yield Place(str(file), reader.line_num), row
        except csv.Error as error:
            problem = f"{file}:{reader.line_num + 1}: malformed table: {error}, in the row that begins here"
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
        raise DataError(Fault("", f"{file}: is not a whole parquet file: {reason}", "write it anew")) from None


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
    """What the machine or the encoding refuses while a file is read, as a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        problem = f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})"
        raise DataError(Fault("", problem, "convert it (iconv -t utf-8), or correct the path")) from None
    except OSError as error:
        problem = f"{file}: cannot be read: {error.strerror or error}"
        raise DataError(Fault("", problem, "correct its permissions or the path")) from None
