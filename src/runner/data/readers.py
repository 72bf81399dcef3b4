"""Read rows from json, jsonl, csv, tsv, parquet and txt files.

Errors in a file are raised as DataError with the file name, and the line if known.
"""

from __future__ import annotations

import csv
import datetime
import decimal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner.data import strict_json
from runner.data.data_files import readable
from runner.errors import DataError, Fault, first_line, quoted

Row = dict[str, Any]
Documents = Literal["file", "paragraph"]


class Place(NamedTuple):
    """The position of a row in its file, for error messages."""

    file: str
    number: int
    """Starts at 1."""
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}, row {self.number}"


def read(files: list[Path], documents: Documents) -> Iterator[tuple[Place, Row]]:
    """Yield every row of the files with its position; ``documents``: whether a txt file or a paragraph is a row."""
    for file in files:
        empty = True
        with readable(file):
            for place, row in _read_file(file, documents):
                if not isinstance(row, dict):
                    problem = f"{place}: a row must be a JSON object, not {type(row).__name__}"
                    raise DataError(Fault("", problem, 'write for example {"messages": […]} or {"text": "…"}'))
                empty = False
                yield place, row
        if empty:
            raise DataError(Fault("", f"{file}: contains no rows", "add rows, or remove the file"))


def of_arrow(value: Any) -> Any:
    """A value of an Arrow table as JSON has it: dates as texts, decimals as numbers, objects without their nulls.

    Arrow gives each object of a column the keys of all others, as nulls: a call would get arguments that its row does
    not have.
    """
    if isinstance(value, dict):
        return {key: of_arrow(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [of_arrow(each) for each in value]
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


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
    remedy = "rename the file to .jsonl: it contains one object per line" if is_lines else ""
    content = strict_json.parse(file, text, remedy)
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
                yield Place(name, number), strict_json.parse(file, line.rstrip(), remedy, number)


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for documents
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if names.count(name) > 1), None):
                problem = f"{file}:{reader.line_num}: the column {quoted(twice)} occurs twice"
                raise DataError(Fault("", problem, "rename or remove one of them"))
            if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), "")):
                problem = f"{file}: the columns are separated by {quoted(other)}, not by {quoted(delimiter)}"
                raise DataError(Fault("", problem, f"write the file with {quoted(delimiter)} between the columns"))
            for row in reader:
                if any("\0" in f"{name}{value}" for name, value in row.items()):
                    raise _no_text(file, reader.line_num)
                if None in row or None in row.values():
                    columns = ", ".join(reader.fieldnames or ())
                    problem = f"{file}:{reader.line_num}: number of values differs from number of columns ({columns})"
                    raise DataError(Fault("", problem, 'correct that line; quote values that contain commas or "'))
                yield Place(str(file), reader.line_num), row
        except csv.Error as error:
            problem = f"{file}:{reader.line_num + 1}: malformed table: {error}, in the row that starts at this line"
            raise DataError(Fault("", problem, "correct that line")) from None


def _no_text(file: Path, line: int) -> DataError:
    problem = f"{file}:{line}: contains the character NUL: it is no UTF-8 text (UTF-16, or a binary file)"
    return DataError(Fault("", problem, "convert the file (iconv -f utf-16le -t utf-8), or correct the path"))


def _read_parquet(file: Path) -> Iterator[tuple[Place, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            problem = f"{file}: the column {quoted(twice)} occurs twice"
            raise DataError(Fault("", problem, "rename or remove one of them"))
        rows = (row for batch in table.iter_batches(batch_size=4096) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Place(str(file), number, "row"), {key: of_arrow(value) for key, value in row.items()}
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if getattr(error, "errno", None):
            raise
        problem = f"{file}: damaged or not a parquet file: {first_line(error)}"
        raise DataError(Fault("", problem, "write or download the file again")) from None


def _read_text(file: Path, documents: Documents) -> Iterator[tuple[Place, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as handle:
        text = handle.read().replace("\r\n", "\n")
    if "\n" not in text:
        text = text.replace("\r", "\n")  # the line ends of old Macs
    if (at := text.find("\0")) >= 0:
        raise _no_text(file, text.count("\n", 0, at) + 1)
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
