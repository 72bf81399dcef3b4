"""Convert rows to examples, remove duplicates, and split so that no prompt is in both training and evaluation."""

from __future__ import annotations

import array
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runner.data import row_options
from runner.data.conversation import no_json
from runner.errors import DataError, Fault, refuse

if TYPE_CHECKING:
    from runner.data.examples import Example, Format

SHOWN_FAULTS = 5


class Item(NamedTuple):
    """An example with its place, and the number of its row in the source."""

    number: int
    place: str
    example: Example
    prompt: int
    """Hash of its prompt."""
    place_in_order: int


@dataclass(frozen=True)
class Index:
    """The examples of one split as hashes, in the order of their rows: the examples stay in the source."""

    records: Iterable[tuple[object, Mapping[str, Any]]]
    numbers: np.ndarray
    """(examples,) int64: the numbers of their rows in ``records``, ascending."""
    keys: np.ndarray
    """(examples,) uint64: hashes of the examples."""
    prompts: np.ndarray
    """(examples,) uint64: hashes of the prompts, without regard to case and white space."""
    places: np.ndarray
    """(examples,) int64: their places in the order of ``data.order_by``; 0 without it."""

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, chosen: np.ndarray | slice) -> Index:
        """The chosen examples: a mask, a slice or ascending positions."""
        columns = {name: getattr(self, name)[chosen] for name in ("numbers", "keys", "prompts", "places")}
        return replace(self, **columns)


def index(
    records: Iterable[tuple[object, Mapping[str, Any]]],
    format_fn: Format,
    deduplicate: bool,
    counts: Counter[str],
    *,
    where: str | None = None,
    order_by: str | None = None,
) -> Index:
    """Hash the examples of one split; ``deduplicate`` leaves out repeated examples.

    ``where``, ``order_by``: see ``row_options``. Adds ``rows_read``, ``filtered``,
    ``left_out`` and ``duplicates`` to ``counts``.

    Raises:
        DataError: lists the first malformed rows, at most ``SHOWN_FAULTS``.
    """
    numbers, keys, prompts = array.array("q"), array.array("Q"), array.array("Q")
    values, faults = list[Any](), list[Fault]()
    rows = row_options.Filter(where) if where is not None else None
    for number, (place, row) in enumerate(records):
        counts["rows_read"] += 1
        if rows is not None and not rows.keeps(row):
            counts["filtered"] += 1
            continue
        try:
            example = format_fn(row)
            if example is None:
                counts["left_out"] += 1
                continue
            values += [row_options.order_value(row, order_by)] if order_by is not None else []
            key = _hash(json.dumps(example, default=no_json))
        except DataError as error:
            faults += at_place(place, error)
            if len(faults) >= SHOWN_FAULTS or faults[-1].key:  # a fault with a config key would repeat for every row
                break
            continue
        numbers.append(number)
        keys.append(key)
        prompts.append(_hash(" ".join(_prompt(example).split()).casefold()))
    refuse(faults, DataError)
    if counts["left_out"] and not numbers:
        remedy = "return messages or a text (is a `return` missing?); None leaves a row out"
        raise DataError(Fault("data.format", "gave None for every row", remedy))
    if rows is not None:
        rows.refuse_unseen()
    hashes = [np.frombuffer(column, dtype=np.uint64) for column in (keys, prompts)]
    places = row_options.ranks(values, order_by) if order_by is not None else np.zeros(len(keys), dtype=np.int64)
    examples = Index(records, np.frombuffer(numbers, dtype=np.int64), hashes[0], hashes[1], places)
    if not deduplicate:
        return examples
    first = np.sort(np.unique(examples.keys, return_index=True)[1])
    counts["duplicates"] += len(examples) - len(first)
    return examples.of(first)


def items(examples: Index, format_fn: Format) -> Iterator[Item]:
    """The examples of an index, read from the source again."""
    columns = (column.tolist() for column in (examples.numbers, examples.prompts, examples.places))
    wanted = zip(*columns, strict=True)
    upcoming = next(wanted, None)
    for number, (place, row) in enumerate(examples.records):
        if upcoming is None:
            return
        if number == upcoming[0]:
            if (example := format_fn(row)) is None:
                problem, remedy = "gave None for a row that it kept before", "let it depend on the row alone"
                raise DataError(*at_place(place, DataError(Fault("data.format", problem, remedy))))
            yield Item(number, str(place), example, *upcoming[1:])
            upcoming = next(wanted, None)


def split_by_prompt(examples: Index, fraction: float) -> tuple[Index, Index]:
    """Split into (train, eval) by a hash of the prompt: a prompt stays on its side when the dataset changes.

    If a small dataset leaves one side empty, exactly the prompt with the lowest hash is held out.
    """
    prompts = np.unique(examples.prompts)
    held_out = int(np.searchsorted(prompts, np.uint64(int(fraction * 2**64))))  # prompts below it
    if fraction > 0 and len(prompts) > 1 and held_out in (0, len(prompts)):
        held_out = 1
    is_held_out = np.isin(examples.prompts, prompts[:held_out])
    return examples.of(~is_held_out), examples.of(is_held_out)


def limit(examples: Index, count: int | None) -> Index:
    """At most ``count`` examples in their original order, selected by hash: a larger ``count`` keeps the same ones."""
    if count is None or len(examples) <= count:
        return examples
    return examples.of(np.sort(np.argsort(examples.keys, kind="stable")[:count]))


def at_place(place: object, error: DataError) -> list[Fault]:
    """The faults of ``error``, each with its file and line in front of the message."""
    return [replace(fault, problem=f"{place}: {fault.problem}") for fault in error.faults]


def _prompt(example: Example) -> str:
    """The text that must not be in both splits: the first user message, or the whole plain text."""
    if isinstance(example, dict):
        return _prompt(example["prompt"] if "prompt" in example else example["messages"])
    if isinstance(example, str):
        return example
    return next((turn["content"] for turn in example if turn["role"] == "user"), example[0]["content"])


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8])
