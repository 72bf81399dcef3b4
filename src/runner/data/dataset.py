"""Load a tokenised dataset from a cache on disk, keyed by data, format, task, tokenizer and settings.

An entry is a folder of memory-mapped arrays.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import user_code, user_function
from runner.config.schema import DataSettings
from runner.data import column_files, images, streaming, vision
from runner.data.encoding import Recipe
from runner.data.examples import Encoder, Format
from runner.data.packing import Rows
from runner.data.tokenization import DataReport, Tokenised, every_row, tokenise
from runner.errors import DataError, Fault
from runner.files import cache_dir, locked, written_aside

if TYPE_CHECKING:
    from runner.data.sources import Source

CODE_VERSION = 7
"""Part of the cache key. Increase it when a code change alters the tokens of the same data and settings."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Tokenised training and evaluation data, the input of ``Batches``."""

    train: Rows
    eval: Rows
    report: DataReport
    name: str
    digest: str
    """Hash of the rows' content: ``Source.digest``."""
    uri: str
    samples: list[dict[str, str]]
    """A few held-out prompts as text, with their reference answers: {prompt, reference}."""
    settled: Mapping[str, Any]
    """The YAML keys of the task that the training rows have decided."""
    revision: str | None = None
    """Commit hash of a Hub dataset."""
    sources: Mapping[str, Splits] = field(default_factory=dict)
    """The sources of a mixture by name, each with the rows that are trained; empty if the data are no mixture."""
    evals: Mapping[str, Splits] = field(default_factory=dict)
    """Further sets to evaluate on, which have no training rows."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """The share of each source in the trained tokens."""
    is_streamed: bool = False
    """Whether only the first rows of the data were read."""


def load(
    source_fn: Callable[[], Source],
    format_fn: Format,
    task: Encoder,
    tokenizer: Any,
    settings: DataSettings,
    identity: Mapping[str, Any],
    *,
    trains: bool = True,
) -> Splits:
    """Return the tokenised splits from the cache; tokenise first if the cache has no entry. A lock avoids double work.

    ``trains``: False if the data are only evaluated on: without training rows, see ``tokenization.every_row``.

    ``identity``: the config nodes ``format`` and ``task``, and ``code``, the digests of the user's own code if there is
    any. The cache key is a hash of them, the data, the tokenizer and the settings.

    Raises:
        DataError: unreadable or malformed rows, or no rows for training or evaluation.
    """
    source = source_fn()
    key = _cache_key(source, tokenizer, settings, identity if trains else {**identity, "trains": False})
    recipe, make = Recipe(format_fn, task, tokenizer, settings), tokenise if trains else every_row
    try:
        folder = cache_dir("data") / key
        with locked(folder.with_suffix(".lock")):
            entry, pictures = _read(folder)
            if entry is None or pictures is None:
                _write(folder, lambda into: make(_at_hand(source, settings, into, trains), recipe, into))
                entry, pictures = _read(folder)
    except OSError as error:
        problem = f"the cache of tokenised data cannot be written: {error.strerror or error} ({error.filename or key})"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free disk space, or move the cache with RUNNER_CACHE=DIR" if full else "set RUNNER_CACHE=DIR"
        raise DataError(Fault("", problem, remedy)) from error
    assert entry is not None, "an entry that was just written can be read"
    digest = source.digest
    if pictures:
        digest = hashlib.sha256(f"{digest} {pictures}".encode()).hexdigest()[:32]
    return Splits(**vars(entry), name=source.name, digest=digest, uri=source.uri, revision=source.revision,
                  is_streamed=source.is_streamed)  # fmt: skip


def _images(entry: Tokenised) -> str | None:
    """A hash of all images of the rows; empty if there are none, None if one has changed since it was tokenised."""
    digests: list[str] = []
    for rows in (entry.train, entry.eval):
        for row in range(len(rows) if rows.images is not None else 0):
            listed = images.of_rows(rows.images, row)
            if not all(map(images.is_unchanged, listed)):
                return None
            digests += [image["sha256"] for image in listed]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else ""


def _at_hand(source: Source, settings: DataSettings, folder: Path, trains: bool) -> Source:
    return streaming.kept_aside(source, settings, column_files.aside(folder), trains=trains)


def _cache_key(source: Source, tokenizer: Any, settings: DataSettings, identity: Mapping[str, Any]) -> str:
    form = identity.get("format") or {}
    function = form.get("function")
    parts = {
        **({"place": source.uri} if vision.of(tokenizer) is not None else {}),  # relative paths of images begin there
        "code": CODE_VERSION,
        "data": source.digest,
        "identity": user_code.detached(identity),
        "function": user_function.source_text(function, form.get(user_code.PATHS) or ()) if function else None,
        "tokenizer": _fingerprint(tokenizer),
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _fingerprint(tokenizer: Any) -> str:
    """Hash everything that determines the tokens of a text: the tokenizer's vocabulary, rules and chat template."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        fast.no_padding(), fast.no_truncation()  # state of the last call, which to_str would include
    tables = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    marks = [type(tokenizer).__name__, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    marks += list(filter(None, [vision.fingerprint(tokenizer)]))
    return hashlib.sha256(json.dumps([tables, *marks]).encode()).hexdigest()


def _write(folder: Path, make: Callable[[Path], Tokenised]) -> None:
    """Write a cache entry atomically, in the place of a damaged one; ``make`` writes its columns into a folder."""
    with written_aside(folder) as temporary:
        entry = make(temporary)
        shutil.rmtree(temporary / column_files.ASIDE, ignore_errors=True)
        for split, rows in (("train", entry.train), ("eval", entry.eval)):
            if len(rows):
                rows.save(temporary, split)
        meta = {"report": asdict(entry.report), "samples": entry.samples, "settled": dict(entry.settled)}
        (temporary / "report.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False))


def _read(folder: Path) -> tuple[Tokenised | None, str | None]:
    """Read a cache entry, None if it is missing or damaged; and what ``_images`` gives."""
    if not folder.exists():
        return None, None
    try:
        meta = json.loads((folder / "report.json").read_text())
        report = DataReport(**meta["report"])
        train = Rows.load(folder, "train") if report.train_rows else Rows.of([])
        entry = Tokenised(train, Rows.load(folder, "eval"), report, meta["samples"], meta["settled"])
        return entry, _images(entry)
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        log.warning("the cache of tokenised data is damaged, tokenising again: %s (%s)", folder, error)
        return None, None
