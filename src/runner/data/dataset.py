"""From a source of rows to tokens on disk, once for the same (data, format, task, tokenizer, settings).

rows → examples → duplicates out → split by prompt → tokens and labels → packs → a cache folder, memory-mapped.
"""

from __future__ import annotations

import array
import hashlib
import json
import logging
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runner.config import schema, user_code
from runner.config.schema import DataSettings
from runner.data import formats, splits
from runner.data.packing import IGNORED, Rows, one_by_one, pack
from runner.data.splits import Item
from runner.errors import DataError, Fault
from runner.files import cache_dir, locked, write_atomic

if TYPE_CHECKING:
    from runner.data.sources import Source
    from runner.tasks.task import Task

CODE_VERSION = 1
"""To be raised when the same data and settings give other tokens than before."""
SAMPLES = 8

log = logging.getLogger(__name__)

Example = formats.Example


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows; counts of both splits together unless the name says which."""

    rows_read: int = 0
    duplicates: int = 0
    leaked: int = 0
    """Training rows left out because the evaluation file holds their prompt."""
    train_rows: int = 0
    """Tokenised rows: a task may make several of one example."""
    eval_rows: int = 0
    train_tokens: int = 0
    eval_tokens: int = 0
    train_trained_tokens: int = 0
    """Tokens that count in the loss: those with a label and a token before them."""
    eval_trained_tokens: int = 0
    truncated: int = 0
    """Rows cut at ``data.max_length``."""
    dropped: int = 0
    """Rows left out because they are longer than that."""
    masked_out: int = 0
    """Rows left out because no token of theirs is trained, or none within ``data.max_length``."""
    longest: int = 0
    """Tokens of the longest row, before it was cut or dropped."""


@dataclass(frozen=True)
class Splits:
    """Tokenised data, ready for ``Batches``."""

    train: Rows
    eval: Rows
    report: DataReport
    name: str
    digest: str
    """Of the rows' content, as the source gives it."""
    uri: str
    samples: list[dict[str, str]]
    """A few held-out prompts as text, with what followed them: {prompt, reference}."""
    revision: str | None = None
    """The commit of a dataset of the Hub."""


def load(
    source_fn: Callable[[], Source],
    format_fn: Callable[[Mapping[str, Any]], Example],
    task: Task,
    tokenizer: Any,
    settings: DataSettings,
    identity: Mapping[str, Any],
) -> Splits:
    """The tokenised splits, from the cache where the same was made before; two processes make it once.

    ``identity`` holds the nodes ``format`` and ``task`` as configured, and ``code``, the digests of the user's own code
    (if any). With the content of the data, the tokenizer and the settings it determines the tokens.

    Raises:
        DataError: rows that cannot be read or do not fit, or nothing to train or to evaluate on.
    """
    source = source_fn()
    key = _cache_key(source, tokenizer, settings, identity)
    try:
        folder = cache_dir("data") / key
        with locked(folder.with_suffix(".lock")):
            found = _read(folder)
            if found is None:
                _write(folder, _make(source, format_fn, task, tokenizer, settings))
                found = _read(folder)
    except OSError as error:
        problem = f"the cache of tokenised data cannot be written: {error.strerror or error} ({error.filename or key})"
        raise DataError(Fault("", problem, "free space, or move the cache with RUNNER_CACHE=DIR")) from error
    assert found is not None, "what was just written can be read"
    return Splits(**vars(found), name=source.name, digest=source.digest, uri=source.uri, revision=source.revision)


def every_row(
    source: Source,
    format_fn: Callable[[Mapping[str, Any]], Example],
    task: Task,
    tokenizer: Any,
    settings: DataSettings,
) -> tuple[Rows, DataReport]:
    """All rows of a source to evaluate on, ``eval_rows`` at most: those it brings for that, else all; not cached.

    Raises:
        DataError: rows that cannot be read or do not fit, or nothing to evaluate on.
    """
    counts: Counter[str] = Counter()
    records = source.train if source.eval is None else source.eval
    items = splits.limit(splits.collect(records, format_fn, settings.deduplicate, counts), settings.eval_rows)
    rows = _split("eval", items, task, tokenizer, settings, counts)
    return rows, DataReport(**counts)


@dataclass(frozen=True)
class _Made:
    """What the cache keeps of Splits."""

    train: Rows
    eval: Rows
    report: DataReport
    samples: list[dict[str, str]]


class _Columns(NamedTuple):
    """The tokenised rows of a split, one after the other."""

    ids: array.array
    labels: array.array
    offsets: list[int]


def _make(
    source: Source, format_fn: Callable[..., Example], task: Task, tokenizer: Any, settings: DataSettings
) -> _Made:
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
    rows = {split: _split(split, items, task, tokenizer, settings, counts) for split, items in chosen.items()}
    continued = (task.prompt(item.example, tokenizer) for item in chosen["eval"][:SAMPLES])
    samples = [{"prompt": prompt, "reference": reference} for prompt, reference in filter(None, continued)]
    return _Made(rows["train"], rows["eval"], DataReport(**counts), samples)


def _split(
    split: str, items: list[Item], task: Task, tokenizer: Any, settings: DataSettings, counts: Counter[str]
) -> Rows:
    """The tokens of one split; adds to ``counts``."""
    columns = _encode(items, task, tokenizer, settings, counts)
    if len(columns.offsets) == 1:
        raise _nothing_left(split, items, counts, settings)
    rows = _to_rows(columns, settings)
    counts[f"{split}_rows"] += len(rows)
    counts[f"{split}_tokens"] += len(columns.ids)
    counts[f"{split}_trained_tokens"] += _count_trained(rows)
    return rows


def _encode(
    items: Iterable[Item], task: Task, tokenizer: Any, settings: DataSettings, counts: Counter[str]
) -> _Columns:
    columns = _Columns(array.array("i"), array.array("i"), [0])
    for item in items:
        try:
            features = task.encode(item.example, tokenizer, settings.max_length)
        except DataError as error:
            raise DataError(*splits.at_place(item.place, error)) from error
        counts["masked_out"] += not features
        for feature in features:
            ids, labels = feature["input_ids"], feature["labels"]
            counts["longest"] = max(counts["longest"], len(ids))
            if len(ids) > settings.max_length:
                counts["truncated" if settings.overlong == "truncate" else "dropped"] += 1
                if settings.overlong == "drop":
                    continue
                ids, labels = ids[: settings.max_length], labels[: settings.max_length]
            if labels.count(IGNORED) >= len(labels) - (bool(labels) and labels[0] != IGNORED):
                counts["masked_out"] += 1  # a label on the first token has nothing before it to be predicted from
                continue
            columns.ids.extend(ids)
            columns.labels.extend(labels)
            columns.offsets.append(len(columns.ids))
    return columns


def _to_rows(columns: _Columns, settings: DataSettings) -> Rows:
    offsets = np.array(columns.offsets, dtype=np.int64)
    packs = pack(np.diff(offsets), settings.max_length) if settings.packing else one_by_one(len(offsets) - 1)
    ids, labels = (np.frombuffer(column, dtype=np.int32) for column in (columns.ids, columns.labels))
    return Rows(ids, labels, offsets, packs)


def _count_trained(rows: Rows) -> int:
    trained = rows.labels != IGNORED
    trained[rows.offsets[:-1]] = False
    return int(trained.sum())


def _nothing_left(split: str, items: list[Item], counts: Counter[str], settings: DataSettings) -> DataError:
    read = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in ("rows_read", "duplicates", "leaked"))
    if not items and split == "eval" and counts["rows_read"] == 1:
        remedy = "a text file is one row: data.documents=paragraph cuts it at blank lines; or name data.eval_path"
        return DataError(Fault("data", "has one row, and none is left to evaluate on", remedy))
    if not items and split == "eval":
        return DataError(schema.nothing_held_out(f"holds no row out ({read})", settings.eval_fraction))
    if not items:
        return DataError(Fault("data", f"no row is left to train on ({read})", "give it more rows, or other ones"))
    kind = "training" if split == "train" else "evaluation"
    if counts["dropped"] and counts["dropped"] >= counts["masked_out"]:
        problem = f"every {kind} row is longer than that (the longest has {counts['longest']} tokens)"
        remedy = "raise it, or cut them with data.overlong=truncate"
        return DataError(Fault("data.max_length", problem, remedy, settings.max_length))
    problem = f"none of the {len(items)} {kind} rows has a token to train on: all are masked"
    if counts["truncated"]:
        problem += f" ({counts['truncated']} were cut at data.max_length={settings.max_length})"
    remedy = "raise data.max_length, check that the answers are the assistant's, or set task.train_on=all"
    return DataError(Fault("task.train_on", problem, remedy))


def _cache_key(source: Source, tokenizer: Any, settings: DataSettings, identity: Mapping[str, Any]) -> str:
    form = identity.get("format") or {}
    function = form.get("function")
    parts = {
        "code": CODE_VERSION,
        "data": source.digest,
        "identity": user_code.detached(identity),
        "function": formats.source_text(function, form.get(user_code.PATHS) or ()) if function else None,
        "tokenizer": _fingerprint(tokenizer),
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _fingerprint(tokenizer: Any) -> str:
    """Over all that decides which tokens a text becomes: the tokenizer's own tables and its chat template."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        fast.no_padding(), fast.no_truncation()  # set by whoever called it last
    tables = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    marks = [type(tokenizer).__name__, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps([tables, *marks]).encode()).hexdigest()


def _write(folder: Path, made: _Made) -> None:
    """Write a cache entry aside, then move it into place: a reader finds all of it or nothing."""
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        aside.mkdir()
        for split in ("train", "eval"):
            getattr(made, split).save(aside, split)
        meta = {"report": asdict(made.report), "samples": made.samples}
        write_atomic(aside / "report.json", json.dumps(meta, indent=1, ensure_ascii=False))
        shutil.rmtree(folder, ignore_errors=True)  # a corrupt one
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(folder: Path) -> _Made | None:
    """A cache entry; None where there is none, or one that is damaged."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "report.json").read_text())
        train, held_out = Rows.load(folder, "train"), Rows.load(folder, "eval")
        return _Made(train, held_out, DataReport(**meta["report"]), meta["samples"])
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        log.warning("the cache of tokenised data is damaged and is made anew: %s (%s)", folder, error)
        return None
