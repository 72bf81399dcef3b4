"""Tokenise the rows of a dataset: rows → examples → deduplicate → split by prompt → tokens and labels → packs."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runner.config import schema
from runner.config.schema import DataSettings
from runner.data import column_files, encoding, row_options, splits
from runner.data.encoding import Encoded, Recipe
from runner.data.examples import Encoder
from runner.data.packing import IMAGE_COLUMNS, RECORD_COLUMNS, VALUE, Rows, one_by_one, pack_in_order, pack_units
from runner.data.row_options import WithSystemPrompt
from runner.data.splits import Index
from runner.data.texts import Texts
from runner.errors import DataError, Fault

if TYPE_CHECKING:
    from runner.data.sources import Records, Source

SAMPLES = 8
"""Held-out prompts kept for text samples during training."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of the preprocessing. A field without ``train`` or ``eval`` in its name counts both splits."""

    rows_read: int = 0
    duplicates: int = 0
    leaked: int = 0
    """Training rows removed because the evaluation rows contain the same prompt."""
    filtered: int = 0
    """Rows that do not meet ``data.where``."""
    left_out: int = 0
    """Rows for which the format, a function of the user's, gives None."""
    own_system_prompt: int = 0
    """Rows that keep a system prompt of their own; with ``data.system_prompt``."""
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
    images: int = 0
    """Images of the rows, before rows are dropped."""
    image_tokens: int = 0
    """Tokens that stand for them."""
    dropped_with_images: int = 0
    """Of ``dropped``, the rows with images: these are never truncated."""
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


def tokenise(source: Source, recipe: Recipe, folder: Path | None = None) -> Tokenised:
    """Tokenise a source; ``folder``: where the tokens are written, so that they need not fit into memory.

    Raises:
        DataError: unreadable or malformed rows, or no rows for training or evaluation.
    """
    settings, counts = recipe.settings, Counter[str]()
    train = _indexed(source.train, recipe, counts, folder, "train", order_by=settings.order_by)
    if source.eval is not None:
        held_out = _indexed(source.eval, recipe, counts, folder, "eval")
        prompts = np.unique(held_out.prompts)
        leaked, kept = train.divided("prompts", functools.partial(column_files.is_among, others=prompts))
        counts["leaked"] = len(leaked)
    else:
        kept, held_out = splits.split_by_prompt(train, settings.eval_fraction)
    chosen = {"train": splits.limit(kept, settings.train_rows), "eval": splits.limit(held_out, settings.eval_rows)}
    if recipe.task.settle is not None:
        examples = [item.example for item in splits.items(chosen["train"], recipe.format_fn)]
        recipe = replace(recipe, task=recipe.task.settle(examples))
    rows, lengths = dict[str, Rows](), list[np.ndarray]()
    for split, of_split in chosen.items():
        rows[split], before = _split(split, of_split, recipe, counts, folder)
        lengths.append(before)
    first = splits.items(chosen["eval"].of(slice(SAMPLES)), recipe.format_fn)
    prompts_with_answers = (recipe.task.prompt(item.example, recipe.tokenizer) for item in first)
    samples = [{"prompt": prompt, "reference": reference} for prompt, reference in filter(None, prompts_with_answers)]
    return Tokenised(rows["train"], rows["eval"], _with_lengths(counts, lengths), samples, recipe.task.settled)


def every_row(source: Source, recipe: Recipe, folder: Path | None = None) -> Tokenised:
    """Tokenise a source for evaluation: its evaluation rows if it has any, else all its rows; no training rows.

    At most ``settings.eval_rows`` rows.

    Raises:
        DataError: unreadable or malformed rows, or no rows.
    """
    settings, counts = recipe.settings, Counter[str]()
    records = source.train if source.eval is None else source.eval
    examples = _indexed(records, recipe, counts, folder, "eval")
    rows, before = _split("eval", splits.limit(examples, settings.eval_rows), recipe, counts, folder)
    return Tokenised(Rows.of([]), rows, _with_lengths(counts, [before]), [], {})


def _indexed(
    records: Records,
    recipe: Recipe,
    counts: Counter[str],
    folder: Path | None,
    split: str,
    order_by: str | None = None,
) -> Index:
    settings, form = recipe.settings, recipe.format_fn
    found = splits.index(records, form, settings.deduplicate, counts, where=settings.where, order_by=order_by,
                         folder=column_files.aside(folder), prefix=split)  # fmt: skip
    if isinstance(form, WithSystemPrompt):
        counts["own_system_prompt"] = form.own  # of this and of earlier splits
        if form.own == counts["rows_read"] - counts["filtered"] - counts["left_out"] > 0:
            problem = "has no effect: all rows have a system prompt of their own"
            raise DataError(Fault(row_options.SYSTEM_PROMPT, problem, "set it to null", settings.system_prompt))
    return found


def _with_lengths(counts: Counter[str], lengths: list[np.ndarray]) -> DataReport:
    of_length = Counter[int]()
    for length in lengths:
        for part in column_files.blocks(len(length)):
            found = np.unique(length[part], return_counts=True)
            of_length.update(dict(zip(*(each.tolist() for each in found), strict=True)))
    ordered = sorted(of_length)
    ends = list(itertools.accumulate(of_length[length] for length in ordered))
    most = ordered[bisect.bisect_left(ends, math.ceil(0.95 * ends[-1]))]
    return DataReport(**counts, longest_of_95_percent=most)


def _split(
    split: str, examples: Index, recipe: Recipe, counts: Counter[str], folder: Path | None
) -> tuple[Rows, np.ndarray]:
    """(tokenised split, tokens of each unit before truncating); adds to ``counts``."""
    encoded = encoding.encode(examples, recipe, counts, folder, split)
    if not len(encoded.columns["row_lengths"]):
        raise _no_rows(split, len(examples), counts, recipe.settings)
    rows = _to_rows(encoded, recipe.settings, recipe.task, folder, split)
    counts[f"{split}_rows"] += len(rows)
    counts[f"{split}_tokens"] += len(rows.ids)
    counts[f"{split}_trained_tokens"] += int(rows.labels_per_row.sum())
    return rows, encoded.columns["unit_lengths"]


def _to_rows(encoded: Encoded, settings: DataSettings, task: Encoder, folder: Path | None, split: str) -> Rows:
    columns, lengths = encoded.columns, encoded.columns["row_lengths"]
    capacity, places = task.unit * settings.max_length, columns.get("places")
    if not settings.packing:
        packs = one_by_one(len(lengths), task.unit, folder, split)
    elif places is None:
        packs = pack_units(lengths, task.unit, capacity, folder, split)
    else:
        packs = pack_in_order(lengths, places, task.unit, capacity)
    records = None
    if task.answers and task.answers.of_prompts:
        ends = _offsets(columns["record_lengths"], folder, f"{split}.{RECORD_COLUMNS[1]}")
        records = Texts(columns["records"], ends)
    return Rows(
        ids=columns["ids"],
        labels=columns["labels"],
        offsets=_offsets(lengths, folder, f"{split}.offsets"),
        packs=packs,
        unit=task.unit,
        values={name: columns[f"{VALUE}{name}"] for name in task.values},
        weights=columns["weights"] if encoded.is_weighted else None,
        records=records,
        prompts=columns["prompts"],
        trained=columns["trained"],
        places=places,
        images=_images(columns, folder, split),
    )


def _images(columns: Mapping[str, np.ndarray], folder: Path | None, split: str) -> Texts | None:
    if "images" not in columns:
        return None
    ends = _offsets(columns["images_lengths"], folder, f"{split}.{IMAGE_COLUMNS[1]}")
    return Texts(columns["images"], ends)


def _offsets(lengths: np.ndarray, folder: Path | None, name: str) -> np.ndarray:
    path = None if folder is None else folder / f"{name}.npy"
    return column_files.stored(column_files.running_total(lengths), "q", path)


def _no_rows(split: str, items: int, counts: Counter[str], settings: DataSettings) -> DataError:
    names = ["rows_read", *(name for name in ("filtered", "left_out") if counts[name]), "duplicates", "leaked"]
    summary = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in names)
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
        can_cut = settings.overlong == "drop" and not counts["dropped_with_images"]
        remedy = "increase the limit" + ", or truncate the rows with data.overlong=truncate" * can_cut
        if counts["dropped_with_images"]:
            each = counts["image_tokens"] / counts["images"]
            problem += f"; an image takes {each:.0f} tokens on average, and rows with images are never cut"
        return DataError(Fault("data.max_length", problem, remedy, settings.max_length))
    problem = f"none of the {items} {kind} rows has a label: all tokens are masked"
    if counts["truncated"]:
        problem += f" ({counts['truncated']} rows were truncated to data.max_length={settings.max_length})"
    if counts["reasoning_lost"]:
        problem += f" ({counts['reasoning_lost']} answers lost their reasoning: the chat template leaves it out)"
        remedy = "train the answers without it: task.reasoning=false, or use a model whose chat template writes it"
        return DataError(Fault("task.reasoning", problem, remedy, True))
    remedy = "increase data.max_length, check that answers have the role assistant and not the weight 0, "
    remedy += "or set task.train_on=all"
    return DataError(Fault("task.train_on", problem, remedy))
