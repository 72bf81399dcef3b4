"""Encode examples as columns of tokens, in one process or in several.

Examples stream from their source into the columns. Several processes read the whole source, and each encodes every
n-th chunk of examples into files of its own; their chunks are then joined in the order of the examples.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runner.config.schema import DataSettings
from runner.data import splits, vision
from runner.data.column_files import DTYPES, Column, aside, open_columns
from runner.data.examples import Encoder, Features, Format
from runner.data.packing import IGNORED, VALUE
from runner.data.row_options import WithSystemPrompt
from runner.data.splits import Index, Item
from runner.errors import DataError, Fault

CHUNK = 1000
"""Examples that a process encodes before the next chunk of its own."""
PAYS_FROM = 20_000
"""Examples from which several processes are faster than one."""
MOST_PROCESSES = 32
WORKING = {"row_lengths": "i", "unit_lengths": "i", "record_lengths": "i", "images_lengths": "i"}
"""Columns that are not kept: tokens of each row, tokens of each unit before truncating, bytes of each record and of
what is known of its images."""


@dataclass(frozen=True)
class Recipe:
    """How a row becomes token sequences."""

    format_fn: Format
    task: Encoder
    tokenizer: Any
    settings: DataSettings

    def __post_init__(self) -> None:
        prompt = self.settings.system_prompt
        if prompt is not None and not isinstance(self.format_fn, WithSystemPrompt):
            object.__setattr__(self, "format_fn", WithSystemPrompt(self.format_fn, prompt))

    @property
    def codes(self) -> dict[str, str]:
        """The columns and their types."""
        values = {f"{VALUE}{name}": "f" for name in self.task.values}
        records = {"records": "B"} if self.task.answers and self.task.answers.of_prompts else {}
        places = {"places": "q"} if self.settings.order_by is not None else {}
        pictures = {"images": "B"} if vision.of(self.tokenizer) is not None else {}
        return {
            "ids": "i",
            "labels": "i",
            "weights": "f",
            "prompts": "Q",
            "trained": "q",
            **places,
            **values,
            **records,
            **pictures,
        }


class Encoded(NamedTuple):
    """The token sequences of many examples."""

    columns: dict[str, np.ndarray]
    is_weighted: bool
    """Whether any label has another weight than 1."""


def encode(examples: Index, recipe: Recipe, counts: Counter[str], folder: Path | None, prefix: str) -> Encoded:
    """Encode the examples; adds to ``counts``. The columns are in files of ``folder``, without one in memory.

    Raises:
        DataError: a row cannot be encoded.
    """
    columns = {**open_columns(recipe.codes, folder, prefix), **open_columns(WORKING, aside(folder), prefix)}
    is_vision = vision.of(recipe.tokenizer) is not None  # torch's threads, which a processor may use, end with a fork
    processes = _processes(len(examples)) if folder is not None and not is_vision else 1
    if processes == 1 or folder is None:
        is_weighted = _stream(splits.items(examples, recipe.format_fn), recipe, columns, counts)
    else:
        is_weighted = _in_processes(processes, examples, recipe, columns, counts, folder)
    return Encoded({name: column.finish() for name, column in columns.items()}, is_weighted)


def _stream(examples: Iterable[Item], recipe: Recipe, columns: Mapping[str, Column], counts: Counter[str]) -> bool:
    """Encode examples; returns whether a label has another weight than 1."""
    task, is_weighted, reader = recipe.task, False, vision.of(recipe.tokenizer)
    for item in examples:
        try:
            example = item.example if reader is None else reader.settled(item.example, item.folder)
            features = task.encode(example, recipe.tokenizer, recipe.settings.max_length)
        except DataError as error:
            raise DataError(*splits.at_place(item.place, error)) from error
        if not task.weights and any("weights" in feature for feature in features):
            problem = f"{item.place}: has a weight, which task={task.name} does not use"
            raise DataError(Fault("task", problem, "leave the weight out: +data.format.ignore=[weight]", task.name))
        counts["masked_out"] += not features
        if reader is not None:
            counts["images"] += sum(len(feature.get("images", ())) for feature in features)
            counts["image_tokens"] += sum(feature.get("image_tokens", 0) for feature in features)
        counts["reasoning_lost"] += sum(feature.get("reasoning_lost", 0) for feature in features)
        assert len(features) % task.unit == 0, f"{task.name}: {len(features)} sequences are not whole units"
        for start in range(0, len(features), task.unit):
            is_weighted |= _add_unit(features[start : start + task.unit], item, recipe, columns, counts)
    return is_weighted


def _add_unit(
    unit: list[Features], item: Item, recipe: Recipe, columns: Mapping[str, Column], counts: Counter[str]
) -> bool:
    """Add the sequences of one unit; none of them if one is dropped or has no label within ``data.max_length``."""
    task, limit, has_record = recipe.task, recipe.settings.max_length, "records" in columns
    longest = max(len(feature["input_ids"]) for feature in unit)
    counts["longest"] = max(counts["longest"], longest)
    columns["unit_lengths"].append(longest)
    if longest > limit:
        has_images = any(feature.get("images") for feature in unit)  # a cut could leave a part of an image
        is_dropped = recipe.settings.overlong == "drop" or not task.truncates or has_record or has_images
        counts["dropped_with_images"] += has_images
        counts["dropped" if is_dropped else "truncated"] += 1
        if is_dropped:
            return False
    cut = [(feature["input_ids"][:limit], feature["labels"][:limit]) for feature in unit]
    if task.is_scored:  # at the last token that is left
        cut = [(ids, [*labels[:-1], *ids[-1:]]) for ids, labels in cut]
    # The first token has no context to be predicted from: its label is unused.
    trained = [len(labels) - labels.count(IGNORED) - (labels[:1] not in ([], [IGNORED])) for _, labels in cut]
    if min(trained) <= 0 if task.needs_labels else not all(ids for ids, _ in cut):
        counts["masked_out"] += 1
        return False
    is_weighted = False
    for feature, (ids, labels), count in zip(unit, cut, trained, strict=True):
        weights = feature.get("weights")
        weights = [1.0] * len(ids) if weights is None else weights[: len(ids)]
        numbers: dict[str, Any] = {"ids": ids, "labels": labels, "weights": weights, "row_lengths": [len(ids)],
                                   "prompts": [item.prompt], "trained": [count]}  # fmt: skip
        numbers |= {f"{VALUE}{name}": [feature[name]] for name in task.values}
        numbers |= {"places": [item.place_in_order]} if "places" in columns else {}
        if has_record:
            record = feature["record"].encode("utf-8", "surrogatepass")
            numbers |= {"records": record, "record_lengths": [len(record)]}
        if "images" in columns:
            listed = json.dumps(feature.get("images", [])).encode()
            numbers |= {"images": listed, "images_lengths": [len(listed)]}
        for name, added in numbers.items():
            columns[name].extend(added)
        is_weighted |= any(w != 1 for w, label in zip(weights, labels, strict=True) if label != IGNORED)
    return is_weighted


def _processes(examples: int) -> int:
    """In how many processes so many examples are encoded: in one where another thread may hold a lock."""
    if examples < PAYS_FROM or not hasattr(os, "sched_getaffinity") or threading.active_count() > 1:
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def _in_processes(
    count: int,
    examples: Index,
    recipe: Recipe,
    columns: Mapping[str, Column],
    counts: Counter[str],
    folder: Path,
) -> bool:
    shards = [folder / f"shard-{number}" for number in range(count)]
    children = {}
    for number, shard in enumerate(shards):
        shard.mkdir()
        if not (child := os.fork()):
            _child(lambda number=number, shard=shard: _shard(number, count, examples, recipe, shard))  # type: ignore[misc]
        children[child] = shard
    killed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(killed):
        problem = f"a process that tokenised rows was killed (exit code {next(filter(None, killed))})"
        raise DataError(Fault("data", problem, "it may have been out of memory: try again with more"))
    results = [pickle.loads((shard / "result").read_bytes()) for shard in shards]
    failed = [(result["chunk"], result["error"]) for result in results if "error" in result]
    if failed:
        raise min(failed, key=lambda pair: int(pair[0]))[1]
    _join(shards, [result["ends"] for result in results], columns)
    for result in results:
        longest = max(counts["longest"], result["counts"]["longest"])
        counts.update(result["counts"])
        counts["longest"] = longest
    for shard in shards:
        shutil.rmtree(shard)
    return any(result["is_weighted"] for result in results)


def _child(work: Callable[[], None]) -> None:
    """Do the work and end this process, a copy of its parent, without what a process does at its end."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # the parent decides
        with contextlib.suppress(Exception):
            work()
            code = 0
    finally:
        os._exit(code)


def _shard(number: int, count: int, examples: Index, recipe: Recipe, folder: Path) -> None:
    """Encode every ``count``-th chunk from chunk ``number`` on into files of ``folder``."""
    columns = open_columns({**recipe.codes, **WORKING}, folder, "")
    counts, ends, is_weighted, parent = Counter[str](), list[dict[str, int]](), False, os.getppid()
    is_mine, starts = np.zeros(len(examples), dtype=bool), range(number * CHUNK, len(examples), count * CHUNK)
    for start in starts:
        is_mine[start : start + CHUNK] = True
    items = splits.items(examples.of(is_mine), recipe.format_fn)
    result: dict[str, Any]
    try:
        for _ in starts:
            is_weighted |= _stream(itertools.islice(items, CHUNK), recipe, columns, counts)
            ends.append({name: len(column) for name, column in columns.items()})
            if os.getppid() != parent:
                os._exit(1)
        for column in columns.values():
            column.finish()
        result = {"ends": ends, "counts": counts, "is_weighted": is_weighted}
    except DataError as error:
        result = {"error": error, "chunk": len(ends) * count + number}
    (folder / "result").write_bytes(pickle.dumps(result))


def _join(shards: list[Path], ends: list[list[dict[str, int]]], columns: Mapping[str, Column]) -> None:
    """Append the chunks of all shards to the columns, in the order of the chunks."""
    for name, column in columns.items():
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((shard / f".{name}.npy").open("rb")) for shard in shards]
            for file in files:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
            for number in range(sum(map(len, ends))):
                shard, turn = number % len(shards), number // len(shards)
                start = ends[shard][turn - 1][name] if turn else 0
                size = ends[shard][turn][name] - start
                column.extend_array(np.fromfile(files[shard], DTYPES[column.code], size))
