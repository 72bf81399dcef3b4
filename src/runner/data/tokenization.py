"""Tokenise the rows of a dataset: rows → examples → deduplicate → split by prompt → tokens and labels → packs."""

from __future__ import annotations

import array
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runner.config import schema
from runner.config.schema import DataSettings
from runner.data import splits
from runner.data.examples import Encoder, Example, Features
from runner.data.packing import IGNORED, Rows, Texts, one_by_one, pack_units
from runner.data.splits import Item
from runner.errors import DataError, Fault

if TYPE_CHECKING:
    from runner.data.sources import Source

SAMPLES = 8
"""Held-out prompts kept for text samples during training."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of the preprocessing. A field without ``train`` or ``eval`` in its name counts both splits."""

    rows_read: int = 0
    duplicates: int = 0
    leaked: int = 0
    """Training rows removed because the evaluation rows contain the same prompt."""
    train_rows: int = 0
    """Tokenised rows; a task may produce several from one example."""
    eval_rows: int = 0
    train_tokens: int = 0
    eval_tokens: int = 0
    train_trained_tokens: int = 0
    """Tokens that enter the loss: those with a label, except the first token of a row."""
    eval_trained_tokens: int = 0
    truncated: int = 0
    """Rows truncated to ``data.max_length``."""
    dropped: int = 0
    """Rows removed because they are longer than ``data.max_length``."""
    masked_out: int = 0
    """Rows removed because no token within ``data.max_length`` has a label."""
    reasoning_lost: int = 0
    """Answers that are not trained because the chat template leaves out their reasoning."""
    longest: int = 0
    """Tokens of the longest row, before truncating or dropping."""
    longest_of_95_percent: int = 0
    """Tokens of the longest row if the longest 5 % are left out: as ``data.max_length`` it affects at most 5 %."""


@dataclass(frozen=True)
class Tokenised:
    """A tokenised dataset, as the cache stores it."""

    train: Rows
    eval: Rows
    report: DataReport
    samples: list[dict[str, str]]
    settled: Mapping[str, Any]


def tokenise(
    source: Source, format_fn: Callable[..., Example], task: Encoder, tokenizer: Any, settings: DataSettings
) -> Tokenised:
    counts: Counter[str] = Counter()
    train = splits.collect(source.train, format_fn, settings.deduplicate, counts)
    if source.eval is not None:
        held_out = splits.collect(source.eval, format_fn, settings.deduplicate, counts)
        prompts = {item.prompt for item in held_out}
        kept = [item for item in train if item.prompt not in prompts]
        counts["leaked"] = len(train) - len(kept)
    else:
        kept, held_out = splits.split_by_prompt(train, settings.eval_fraction)
    chosen = {"train": splits.limit(kept, settings.train_rows), "eval": splits.limit(held_out, settings.eval_rows)}
    if task.settle is not None:
        task = task.settle([item.example for item in chosen["train"]])
    rows, lengths = dict[str, Rows](), list[int]()
    for split, items in chosen.items():
        rows[split], of_split = _split(split, items, task, tokenizer, settings, counts)
        lengths += of_split
    prompts_with_answers = (task.prompt(item.example, tokenizer) for item in chosen["eval"][:SAMPLES])
    samples = [{"prompt": prompt, "reference": reference} for prompt, reference in filter(None, prompts_with_answers)]
    return Tokenised(rows["train"], rows["eval"], _with_lengths(counts, lengths), samples, task.settled)


def every_row(
    source: Source,
    format_fn: Callable[[Mapping[str, Any]], Example],
    task: Encoder,
    tokenizer: Any,
    settings: DataSettings,
) -> tuple[Rows, DataReport]:
    """Tokenise a source for evaluation, without the cache: its evaluation rows if it has any, else all its rows.

    At most ``settings.eval_rows`` rows.

    Raises:
        DataError: unreadable or malformed rows, or no rows.
    """
    counts: Counter[str] = Counter()
    records = source.train if source.eval is None else source.eval
    items = splits.limit(splits.collect(records, format_fn, settings.deduplicate, counts), settings.eval_rows)
    rows, lengths = _split("eval", items, task, tokenizer, settings, counts)
    return rows, _with_lengths(counts, lengths)


def held_out(
    source: Source, format_fn: Callable[..., Example], task: Encoder, tokenizer: Any, settings: DataSettings
) -> Tokenised:
    """``every_row`` of a source, and no training rows."""
    rows, report = every_row(source, format_fn, task, tokenizer, settings)
    return Tokenised(Rows.of([]), rows, report, [], {})


class _Columns(NamedTuple):
    """The tokenised rows of one split, concatenated."""

    ids: array.array
    labels: array.array
    offsets: list[int]
    lengths: list[int]
    """Tokens of each row before truncating or dropping."""
    values: dict[str, array.array]
    weights: array.array
    """The weight of each label."""
    records: list[str] | None
    """A text of each row, if the rows are prompts."""
    prompts: array.array
    """The beginning of ``Item.prompt`` of each row."""


def _with_lengths(counts: Counter[str], lengths: list[int]) -> DataReport:
    most = sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]
    return DataReport(**counts, longest_of_95_percent=most)


def _split(
    split: str, items: list[Item], task: Encoder, tokenizer: Any, settings: DataSettings, counts: Counter[str]
) -> tuple[Rows, list[int]]:
    """(tokenised split, tokens of each row before truncating); adds to ``counts``."""
    columns = _encode(items, task, tokenizer, settings, counts)
    if len(columns.offsets) == 1:
        raise _no_rows(split, items, counts, settings)
    rows = _to_rows(columns, settings, task.unit)
    counts[f"{split}_rows"] += len(rows)
    counts[f"{split}_tokens"] += len(columns.ids)
    counts[f"{split}_trained_tokens"] += int(rows.labels_per_row.sum())
    return rows, columns.lengths


def _encode(
    items: Iterable[Item], task: Encoder, tokenizer: Any, settings: DataSettings, counts: Counter[str]
) -> _Columns:
    values = {name: array.array("f") for name in task.values}
    records: list[str] | None = [] if task.answers else None
    columns = _Columns(array.array("i"), array.array("i"), [0], [], values, array.array("f"), records, array.array("Q"))
    for item in items:
        try:
            features = task.encode(item.example, tokenizer, settings.max_length)
        except DataError as error:
            raise DataError(*splits.at_place(item.place, error)) from error
        if not task.weights and any("weights" in feature for feature in features):
            problem = f"{item.place}: has a weight, which task={task.name} does not use"
            raise DataError(Fault("task", problem, "leave the weight out: +data.format.ignore=[weight]", task.name))
        counts["masked_out"] += not features
        counts["reasoning_lost"] += sum(feature.get("reasoning_lost", 0) for feature in features)
        assert len(features) % task.unit == 0, f"{task.name}: {len(features)} sequences are not whole units"
        for start in range(0, len(features), task.unit):
            _add_unit(features[start : start + task.unit], item.prompt, columns, task, settings, counts)
    return columns


def _add_unit(
    unit: list[Features],
    prompt: bytes,
    columns: _Columns,
    task: Encoder,
    settings: DataSettings,
    counts: Counter[str],
) -> None:
    """Add the sequences of one unit; none of them if one is dropped or has no label within ``data.max_length``."""
    longest = max(len(feature["input_ids"]) for feature in unit)
    counts["longest"] = max(counts["longest"], longest)
    columns.lengths.append(longest)
    if longest > settings.max_length:
        is_dropped = settings.overlong == "drop" or not task.truncates or columns.records is not None
        counts["dropped" if is_dropped else "truncated"] += 1
        if is_dropped:
            return
    cut = [(feature["input_ids"][: settings.max_length], feature["labels"][: settings.max_length]) for feature in unit]
    # The first token has no context to be predicted from: its label is unused.
    is_empty = (labels.count(IGNORED) >= len(labels) - (bool(labels) and labels[0] != IGNORED) for _, labels in cut)
    if any(is_empty) if task.needs_labels else not all(ids for ids, _ in cut):
        counts["masked_out"] += 1
        return
    for feature, (ids, labels) in zip(unit, cut, strict=True):
        columns.ids.extend(ids)
        columns.labels.extend(labels)
        columns.offsets.append(len(columns.ids))
        columns.prompts.append(int.from_bytes(prompt[:8]))
        weights = feature.get("weights")
        columns.weights.extend([1.0] * len(ids) if weights is None else weights[: len(ids)])
        for name, numbers in columns.values.items():
            numbers.append(feature[name])
        if columns.records is not None:
            columns.records.append(feature["record"])


def _to_rows(columns: _Columns, settings: DataSettings, unit: int) -> Rows:
    offsets = np.array(columns.offsets, dtype=np.int64)
    if settings.packing:
        packs = pack_units(np.diff(offsets), unit, unit * settings.max_length)
    else:
        packs = one_by_one(len(offsets) - 1, unit)
    ids, labels = (np.frombuffer(column, dtype=np.int32) for column in (columns.ids, columns.labels))
    values = {name: np.frombuffer(numbers, dtype=np.float32) for name, numbers in columns.values.items()}
    weights = np.frombuffer(columns.weights, dtype=np.float32)
    weighted = None if (weights[labels != IGNORED] == 1).all() else weights
    records = Texts.of(columns.records) if columns.records is not None else None
    prompts = np.frombuffer(columns.prompts, dtype=np.uint64)
    return Rows(ids, labels, offsets, packs, unit, values, weighted, records, prompts)


def _no_rows(split: str, items: list[Item], counts: Counter[str], settings: DataSettings) -> DataError:
    summary = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in ("rows_read", "duplicates", "leaked"))
    if not items and split == "eval" and counts["rows_read"] == 1:
        remedy = "split a text file at blank lines with data.documents=paragraph, or set data.eval_path"
        return DataError(Fault("data", "has one row only, so there is no row for evaluation", remedy))
    if not items and split == "eval":
        return DataError(schema.nothing_held_out(f"selects no rows for evaluation ({summary})", settings.eval_fraction))
    if not items:
        return DataError(Fault("data", f"there are no training rows ({summary})", "add rows, or use another dataset"))
    kind = "training" if split == "train" else "evaluation"
    if counts["dropped"] and counts["dropped"] >= counts["masked_out"]:
        problem = f"every {kind} row is longer than this limit (the longest row has {counts['longest']} tokens)"
        remedy = "increase the limit" + ", or truncate the rows with data.overlong=truncate" * (
            settings.overlong == "drop"
        )
        return DataError(Fault("data.max_length", problem, remedy, settings.max_length))
    problem = f"none of the {len(items)} {kind} rows has a label: all tokens are masked"
    if counts["truncated"]:
        problem += f" ({counts['truncated']} rows were truncated to data.max_length={settings.max_length})"
    if counts["reasoning_lost"]:
        problem += f" ({counts['reasoning_lost']} answers lost their reasoning: the chat template leaves it out)"
        remedy = "train the answers without it: task.reasoning=false, or use a model whose chat template writes it"
        return DataError(Fault("task.reasoning", problem, remedy, True))
    remedy = "increase data.max_length, check that answers have the role assistant and not the weight 0, "
    remedy += "or set task.train_on=all"
    return DataError(Fault("task.train_on", problem, remedy))
