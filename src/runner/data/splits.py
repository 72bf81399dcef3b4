"""Convert rows to examples, remove duplicates, and split so that no prompt is in both training and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.errors import DataError, Fault

if TYPE_CHECKING:
    from runner.data.examples import Example

SHOWN_FAULTS = 5


class Item(NamedTuple):
    """An example with its file and line, and hashes to compare examples and prompts."""

    place: str
    example: Example
    key: bytes
    """Hash of the example."""
    prompt: bytes
    """Hash of the prompt, without regard to case and white space."""


def collect(
    records: Iterable[tuple[object, Mapping[str, Any]]],
    format_fn: Callable[[Mapping[str, Any]], Example],
    deduplicate: bool,
    counts: Counter[str],
) -> list[Item]:
    """Convert the rows of one split to examples; ``deduplicate`` removes repeated examples.

    Adds ``rows_read`` and ``duplicates`` to ``counts``.

    Raises:
        DataError: lists the first malformed rows, at most ``SHOWN_FAULTS``.
    """
    items: dict[bytes, Item] = {}
    faults: list[Fault] = []
    for number, (place, row) in enumerate(records):
        counts["rows_read"] += 1
        try:
            example = format_fn(row)
        except DataError as error:
            faults += at_place(place, error)
            if len(faults) >= SHOWN_FAULTS or faults[-1].key:  # a fault with a config key would repeat for every row
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
    """Split into (train, eval) by a hash of the prompt: a prompt stays on its side when the dataset changes.

    If a small dataset leaves one side empty, exactly the prompt with the lowest hash is held out.
    """
    prompts = {item.prompt for item in items}
    held_out = {prompt for prompt in prompts if int.from_bytes(prompt) < fraction * 2**128}
    if fraction > 0 and len(prompts) > 1 and len(held_out) in (0, len(prompts)):
        held_out = {min(prompts)}
    train = [item for item in items if item.prompt not in held_out]
    return train, [item for item in items if item.prompt in held_out]


def limit(items: list[Item], count: int | None) -> list[Item]:
    """At most ``count`` items in their original order, selected by hash: a larger ``count`` keeps the same items."""
    if count is None or len(items) <= count:
        return items
    selected = sorted(range(len(items)), key=lambda i: (items[i].key, i))[:count]
    return [items[i] for i in sorted(selected)]


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


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
