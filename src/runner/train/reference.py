"""Numbers of each document under the weights before the first step: the reference of preference optimization.

The reference is the model that training starts from, with its dtype, attention and quantization. So it is exact for
LoRA, for adapters that change the base weights (PiSSA, OLoRA), for full fine-tuning, and for a model trained before.
Only documents that this rank will visit are computed, without gradients, in one pass before the first step; the numbers
are cached, and shared by all runs that start from the same weights and data, such as a sweep over ``task.beta``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner.data.batches import Batches
from runner.data.packing import Rows
from runner.errors import ConfigError, Fault
from runner.files import cache_dir, locked, write_atomic
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import Wrapped
from runner.train.parts import Parts

CODE_VERSION = 1
"""Part of the cache key. Increase it when a code change alters the numbers."""
PROOF = 1e-3
"""Relative difference between the first batch while training and its reference above which training is refused."""
ROUNDING = 1e-6
"""The same for a model with dropout, whose random numbers change little in a small model."""
TOLERANCE = 1e-2
"""Relative difference between cached numbers and those of the model at hand above which the cache is not used."""

log = logging.getLogger("runner")
Progress = Callable[[int, int], None]


def unknown(batches: Batches) -> None:
    """Give every row the number NaN, so that a row that is forgotten stops training instead of changing it."""
    _give(batches, np.full(len(batches.rows), np.nan, dtype=np.float32))


def compute(parts: Parts, identity: Mapping[str, Any], progress: Progress) -> None:
    """Give the rows of training and evaluation their numbers. The model must have the weights of the start.

    ``identity``: everything in the configuration that determines these weights. ``progress``: called with
    (batches done, all batches).
    """
    assert parts.task.reference is not None
    start = Start(parts.model, parts.task.reference, parts.wrapped, parts.ranks, identity)
    give(parts.batches, parts.batches.visited(parts.total_steps), start, progress)
    give(parts.evaluation, parts.evaluation.pass_packs, start, progress)
    _prove(parts.batches, start)


@dataclass(frozen=True)
class Start:
    """The model with the weights of the start, and how the numbers are computed."""

    model: torch.nn.Module
    numbers: Callable[[Any, dict[str, Any]], torch.Tensor]
    wrapped: Wrapped
    ranks: Ranks
    identity: Mapping[str, Any]


def give(batches: Batches, packs: list[int], start: Start, progress: Progress) -> None:
    """Give the rows of these packs their numbers: from the cache, or from the model.

    Of several runs that need the same numbers at the same time, one computes them and the others wait for it.
    """
    path = cache_dir("reference") / f"{_key(start, batches.rows)}.npy"
    with locked(path.with_suffix(".computing")) if start.ranks.rank == 0 else contextlib.nullcontext():
        start.ranks.broadcast(None)  # the other ranks wait for rank 0, which has the lock
        _fill(batches, packs, start, path, progress)


def _fill(batches: Batches, packs: list[int], start: Start, path: Path, progress: Progress) -> None:
    numbers = _read(path, len(batches.rows))
    missing = [pack for pack in packs if np.isnan(numbers[batches.rows_of(pack)]).any()]
    known = sorted(set(packs) - set(missing))[:1]
    if not all(start.ranks.gather(all(_agrees(start, batches, pack, numbers) for pack in known))):
        log.warning(f"the cached reference {path.name} does not match the model: computing it again")
        numbers[:], missing = np.nan, packs
    if start.ranks.rank == 0:
        log.info(f"reference: {len(packs) - len(missing)} of {len(packs)} from the cache, {len(missing)} to compute")
    _compute(start, batches, missing, numbers, progress)
    if missing:
        _merge(path, numbers)
    _give(batches, numbers)
    start.ranks.broadcast(None)  # rank 0 keeps the lock until every rank has written


def _prove(batches: Batches, start: Start) -> None:
    """Check that training begins at the reference: the loss of DPO is then ln 2.

    Raises:
        ConfigError: the model gives other numbers in training mode; names its dropout.
    """
    rows, values = _of(start, batches, batches.visited(1)[:1], True)
    expected, dropout = batches.rows.values["reference"][rows], ", ".join(_dropout_of(start.model))
    allowed = ROUNDING if dropout else PROOF
    if all(start.ranks.gather(bool(np.allclose(expected, values, rtol=allowed, atol=allowed)))):
        return
    difference = float(np.abs(expected - values).max(initial=0.0))
    problem = f"the model in training differs from its reference before the first step (by {difference:.3g} nats)"
    cause = dropout or "no dropout was found; its layers compute otherwise in training"
    raise ConfigError(Fault("model", f"{problem}: {cause}", "set the dropout in its config.json to 0"))


def _dropout_of(model: torch.nn.Module) -> list[str]:
    """Each kind of active dropout: ``attention_dropout=0.1``."""
    rates: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            rates[path.rpartition(".")[2]] = module.p
        rates |= {key: value for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)}
    return sorted(f"{key}={value:g}" for key, value in rates.items() if value)


def _compute(start: Start, batches: Batches, packs: list[int], numbers: np.ndarray, progress: Progress) -> None:
    """Write the numbers of these packs. All ranks compute equally many batches: sharded models need every rank."""
    chunks = [packs[at : at + batches.rows_per_batch] for at in range(0, len(packs), batches.rows_per_batch)]
    count = int(start.ranks.largest({"batches": float(len(chunks))})["batches"])
    for number in range(count):
        progress(number, count)
        rows, values = _of(start, batches, chunks[number] if number < len(chunks) else [])
        numbers[rows] = values
    if count:
        progress(count, count)


@torch.no_grad()
def _of(start: Start, batches: Batches, packs: list[int], training: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(rows of these packs, their numbers); ``training``: computed as in training, with dropout if there is any."""
    start.model.train(training)
    with start.wrapped.autocasting():
        values = start.numbers(start.model, start.wrapped.on_device(batches.of(packs)))
    rows = np.concatenate([batches.rows_of(pack) for pack in packs]) if packs else np.array([], dtype=np.int64)
    return rows, values.float().cpu().numpy()


def _agrees(start: Start, batches: Batches, pack: int, numbers: np.ndarray) -> bool:
    """Whether the model gives the cached numbers of one pack."""
    rows, values = _of(start, batches, [pack])
    return np.allclose(numbers[rows], values, rtol=TOLERANCE, atol=TOLERANCE)


def _give(batches: Batches, numbers: np.ndarray) -> None:
    batches.rows = replace(batches.rows, values={**batches.rows.values, "reference": numbers})


def _key(start: Start, rows: Rows) -> str:
    function = f"{start.numbers.__module__}.{start.numbers.__qualname__}"
    digest = hashlib.sha256(json.dumps([CODE_VERSION, function, start.identity], sort_keys=True, default=str).encode())
    for column in (rows.ids, rows.labels, rows.offsets):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path, count: int) -> np.ndarray:
    """The cached numbers (count,), NaN where unknown; a damaged file is computed again."""
    try:
        numbers = np.load(path)
    except (OSError, ValueError, EOFError):
        numbers = np.array([])
    return numbers if numbers.shape == (count,) else np.full(count, np.nan, dtype=np.float32)


def _merge(path: Path, numbers: np.ndarray) -> None:
    """Add numbers to the file, which another run may have extended meanwhile."""
    with locked(path.with_suffix(".lock")):
        merged = np.where(np.isnan(numbers), _read(path, len(numbers)), numbers).astype(np.float32)
        content = io.BytesIO()
        np.save(content, merged)
        write_atomic(path, content.getvalue())
