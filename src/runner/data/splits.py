"""Convert rows to examples, remove duplicates, and split so that no prompt is in both training and evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runner.data import column_files, row_options
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
    folder: str = ""
    """That of its file; empty if it is from none."""


@dataclass(frozen=True)
class Index:
    """The examples of one split as hashes, in the order of their rows: the examples stay in the source."""

    records: Iterable[tuple[object, Mapping[str, Any]]]
    columns: Mapping[str, np.ndarray]
    """Of all examples that were read, (read,) each, in files where there is a folder:

    ``numbers`` int64: the numbers of their rows in ``records``, ascending; ``keys`` uint64: hashes of the examples;
    ``prompts`` uint64: hashes of the prompts, without regard to case and white space; ``places`` int64: in the order of
    ``data.order_by``, 0 without it.
    """
    kept: np.ndarray
    """(read,) bool: those that are in this index. A choice of them needs one byte of memory an example."""

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return int(np.count_nonzero(self.kept))

    @property
    def prompts(self) -> np.ndarray:
        """(examples,) uint64."""
        return self.columns["prompts"][self.kept]

    def of(self, chosen: np.ndarray | slice) -> Index:
        """The chosen examples: a mask, (examples,) bool, or a slice."""
        if isinstance(chosen, slice):
            mask = np.zeros(len(self), dtype=bool)
            mask[chosen] = True
            chosen = mask
        kept = np.zeros_like(self.kept)
        kept[self.kept] = chosen
        return replace(self, kept=kept)

    def divided(self, column: str, test: Callable[[np.ndarray], np.ndarray]) -> tuple[Index, Index]:
        """(the examples for whose numbers in a column the test holds, the others)."""
        kept = np.zeros_like(self.kept)
        for part in column_files.blocks(len(kept)):
            kept[part] = self.kept[part] & test(self.columns[column][part])
        return replace(self, kept=kept), replace(self, kept=self.kept & ~kept)

    def blocks(self, *columns: str) -> Iterator[tuple[np.ndarray, ...]]:
        """These columns of the examples, block by block."""
        for part in column_files.blocks(len(self.kept)):
            yield tuple(self.columns[name][part][self.kept[part]] for name in columns)


def index(
    records: Iterable[tuple[object, Mapping[str, Any]]],
    format_fn: Format,
    deduplicate: bool,
    counts: Counter[str],
    *,
    where: str | None = None,
    order_by: str | None = None,
    folder: Path | None = None,
    prefix: str = "",
) -> Index:
    """Hash the examples of one split; ``deduplicate`` leaves out repeated examples.

    ``where``, ``order_by``: see ``row_options``. The columns are in files of ``folder`` that begin with ``prefix``,
    without one in memory. Adds ``rows_read``, ``filtered``, ``left_out`` and ``duplicates`` to ``counts``.

    Raises:
        DataError: lists the first malformed rows, at most ``SHOWN_FAULTS``.
    """
    columns = column_files.open_columns({"numbers": "q", "keys": "Q", "prompts": "Q"}, folder, prefix)
    numbers, keys, prompts = columns.values()
    values, faults, before = row_options.Values(), list[Fault](), counts["left_out"]
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
            if order_by is not None:
                values.append(row_options.order_value(row, order_by))
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
    if counts["left_out"] > before and not numbers:
        remedy = "return messages or a text (is a `return` missing?); None leaves a row out"
        raise DataError(Fault("data.format", "gave None for every row", remedy))
    if rows is not None:
        rows.refuse_unseen()
    zeros = np.broadcast_to(np.zeros(1, dtype=np.int64), len(keys))
    places = row_options.ranks(values.content, order_by) if order_by is not None else zeros
    arrays = {**{name: column.finish() for name, column in columns.items()}, "places": places}
    if not deduplicate:
        return Index(records, arrays, np.ones(len(places), dtype=bool))
    examples = Index(records, arrays, first_of_each(arrays["keys"]))
    counts["duplicates"] += len(places) - len(examples)
    return examples


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Whether each key is the first of its value, (keys,) bool; keys: (keys,) uint64, hashes.

    Keys are compared in parts that have the same highest bits, so that only one part is in memory.
    """
    bits = max(1, (len(keys) // column_files.AT_ONCE).bit_length())
    is_first = np.zeros(len(keys), dtype=bool)
    for number in range(2**bits if len(keys) else 0):
        of_blocks = (
            np.flatnonzero(keys[part] >> np.uint64(64 - bits) == number) + part.start
            for part in column_files.blocks(len(keys))
        )
        members = np.concatenate(list(of_blocks))
        is_first[members[np.unique(keys[members], return_index=True)[1]]] = True
    return is_first


def items(examples: Index, format_fn: Format) -> Iterator[Item]:
    """The examples of an index, read from the source again."""
    blocks = examples.blocks("numbers", "prompts", "places")  # Python's numbers of all rows would need 100 bytes a row
    wanted = (each for block in blocks for each in zip(*(column.tolist() for column in block), strict=True))
    upcoming = next(wanted, None)
    for number, (place, row) in enumerate(examples.records):
        if upcoming is None:
            return
        if number == upcoming[0]:
            if (example := format_fn(row)) is None:
                problem, remedy = "gave None for a row that it kept before", "let it depend on the row alone"
                raise DataError(*at_place(place, DataError(Fault("data.format", problem, remedy))))
            folder = os.path.dirname(getattr(place, "file", ""))
            yield Item(number, str(place), example, upcoming[1], upcoming[2], folder)
            upcoming = next(wanted, None)


def split_by_prompt(examples: Index, fraction: float) -> tuple[Index, Index]:
    """Split into (train, eval) by a hash of the prompt: a prompt stays on its side when the dataset changes.

    If a small dataset leaves one side empty, exactly the prompt with the lowest hash is held out.
    """
    ends = [(int(prompts.min()), int(prompts.max())) for (prompts,) in examples.blocks("prompts") if len(prompts)]
    lowest, highest = min((low for low, _ in ends), default=0), max((high for _, high in ends), default=0)
    limit = int(fraction * 2**64)  # prompts below it are held out
    if fraction > 0 and lowest < highest and not lowest < limit <= highest:
        limit = lowest + 1
    held_out, train = examples.divided("prompts", lambda prompts: prompts < np.uint64(limit))
    return train, held_out


def limit(examples: Index, count: int | None) -> Index:
    """At most ``count`` examples in their original order, selected by hash: a larger ``count`` keeps the same ones."""
    if count is None or len(examples) <= count:
        return examples
    shift, keys = np.uint64(48), examples.columns["keys"]
    by_top = np.zeros(2**16, dtype=np.int64)  # how many keys have these highest bits
    for (block,) in examples.blocks("keys"):
        by_top += np.bincount((block >> shift).astype(np.int64), minlength=len(by_top))
    top = int(np.searchsorted(np.cumsum(by_top), count))
    below, _ = examples.divided("keys", lambda keys: keys >> shift < top)
    border, _ = examples.divided("keys", lambda keys: keys >> shift == top)
    at_border = np.flatnonzero(border.kept)
    kept = below.kept.copy()
    kept[at_border[np.argsort(keys[at_border], kind="stable")[: count - len(below)]]] = True
    return replace(examples, kept=kept)


def at_place(place: object, error: DataError) -> list[Fault]:
    """The faults of ``error``, each with its file and line in front of the message."""
    return [replace(fault, problem=f"{place}: {fault.problem}") for fault in error.faults]


def _prompt(example: Example) -> str:
    """The text that must not be in both splits: the first user message with its images, or the whole plain text."""
    if isinstance(example, dict):
        return _prompt(example["prompt"] if "prompt" in example else example["messages"])
    if isinstance(example, str):
        return example
    first = next((turn for turn in example if turn["role"] == "user"), example[0])
    return f"{first['content']} {json.dumps(first['images'])}" if first.get("images") else str(first["content"])


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8])
