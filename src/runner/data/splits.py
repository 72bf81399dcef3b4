"""From the rows of a source to distinct examples, split so that no prompt stands on both sides."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.errors import DataError, Fault

if TYPE_CHECKING:
    from runner.data.formats import Example

SHOWN_FAULTS = 5


class Item(NamedTuple):
    """An example, where it came from, and what tells it and its prompt apart."""

    place: str
    example: Example
    key: bytes
    prompt: bytes


def collect(
    records: Iterable[tuple[object, Mapping[str, Any]]],
    format_fn: Callable[[Mapping[str, Any]], Example],
    deduplicate: bool,
    counts: Counter[str],
) -> list[Item]:
    """The examples of one split, each once where ``deduplicate``; adds to ``counts`` rows_read and duplicates.

    Raises:
        DataError: naming the first few rows that do not fit.
    """
    items: dict[bytes, Item] = {}
    faults: list[Fault] = []
    for number, (place, row) in enumerate(records):
        counts["rows_read"] += 1
        try:
            example = format_fn(row)
        except DataError as error:
            faults += at_place(place, error)
            if len(faults) >= SHOWN_FAULTS or faults[-1].key:  # with a key it is the configuration: all rows have it
                break
            continue
        key = _hash(json.dumps(example))
        if key in items and deduplicate:
            counts["duplicates"] += 1
            continue
        slot = key if deduplicate else _hash(f"{number}")
        items[slot] = Item(str(place), example, key, _hash(" ".join(_prompt(example).split()).casefold()))
    if faults:
        raise DataError(*faults)
    return list(items.values())


def split_by_prompt(items: list[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """(train, eval), by a hash of the prompt: the same prompt is always on the same side, in any version of the data.

    Where little data leaves one side empty, the prompt of the lowest hash alone is held out.
    """
    prompts = {item.prompt for item in items}
    held_out = {prompt for prompt in prompts if int.from_bytes(prompt) < fraction * 2**128}
    if fraction > 0 and len(prompts) > 1 and len(held_out) in (0, len(prompts)):
        held_out = {min(prompts)}
    train = [item for item in items if item.prompt not in held_out]
    return train, [item for item in items if item.prompt in held_out]


def limit(items: list[Item], count: int | None) -> list[Item]:
    """At most ``count`` items, chosen by their hash: a sample that a larger one contains; in the order they stood."""
    if count is None or len(items) <= count:
        return items
    chosen = sorted(range(len(items)), key=lambda at: (items[at].key, at))[:count]
    return [items[at] for at in sorted(chosen)]


def at_place(place: object, error: DataError) -> list[Fault]:
    """The faults of ``error``, each with where it was found."""
    return [replace(fault, problem=f"{place}: {fault.problem}") for fault in error.faults]


def _prompt(example: Example) -> str:
    """What must not be in both splits: the first thing the user says, or the text."""
    if isinstance(example, str):
        return example
    return next((turn["content"] for turn in example if turn["role"] == "user"), example[0]["content"])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
