"""Streamed rows: each is fetched once, and only as many as the settings use.

Rows are read several times while they are tokenised (to split them, and to encode them, in several processes). So the
rows of a stream are kept in files beside the tokens until the tokens are written.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from runner.config.schema import DataSettings
from runner.data.readers import Place, Row
from runner.data.sources import Records, Source


def kept_aside(source: Source, settings: DataSettings, folder: Path | None, *, trains: bool) -> Source:
    """The source, with the first rows of a stream in files of ``folder``; what is no stream stays as it is.

    Rows that are used: the first ``train_rows`` and the first ``eval_rows`` of the splits for them; if one split is for
    both, its first ``train_rows + eval_rows``. ``trains``: False if all rows are for evaluation.
    """
    if not source.is_streamed or folder is None:
        return source
    held_out = settings.eval_rows or 0
    of_train = (settings.train_rows or 0) + (0 if source.eval else held_out) if trains else held_out
    train = _once(source.train, of_train, folder / "train.rows")
    return replace(source, train=train, eval=source.eval and _once(source.eval, held_out, folder / "eval.rows"))


def _once(records: Records, count: int, path: Path) -> Records:
    write = functools.cache(functools.partial(_write, records, count, path))
    return Records(functools.partial(_read, write, path))


def _write(records: Records, count: int, path: Path) -> None:
    assert count, "a stream without a limit is refused: config.schema"
    with path.open("wb") as file:
        for placed in itertools.islice(records, count):
            pickle.dump(placed, file)


def _read(write: Callable[[], None], path: Path) -> Iterator[tuple[Place, Row]]:
    write()
    with path.open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)  # what this process, or the one it is a copy of, has written
