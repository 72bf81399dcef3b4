"""The teacher's most likely tokens at each position, computed once and cached; or the teacher loaded beside the model.

The tokens are computed before the model is loaded, so that both models are never in memory together, and only for the
rows that are visited. The key of the cache is a hash of the teacher's weights, the rows, and the versions of the
libraries. Of several runs that need the same tokens at the same time, one computes them and the others wait.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from runner.data.batches import Batches
from runner.data.packing import Rows
from runner.files import cache_dir, locked, write_atomic
from runner.models.dtypes import dtype_for
from runner.tasks import teacher_logits
from runner.train import build
from runner.train.distributed import wrap
from runner.train.distributed.ranks import Ranks
from runner.train.inputs import Inputs
from runner.train.parts import Parts
from runner.train.prefetch import Prefetcher
from runner.train.teacher import Teacher

CODE_VERSION = 1
"""Part of the cache key. Increase it when a code change alters the numbers."""
NOTED_S = 30
"""Seconds of computing that a process which is killed loses at most."""
DTYPES = {teacher_logits.IDS: np.dtype(np.int32), teacher_logits.LOG_PROBABILITIES: np.dtype(np.float32)}
"""Name of a cached column in a batch → its dtype."""
log = logging.getLogger("runner")
Progress = Callable[[int, int], None]
Split = tuple[Batches, list[int]]
"""Batches and the packs of them that are visited, by any rank."""


def attached(inputs: Inputs, parts: Parts) -> Parts:
    """The parts with the teacher in memory; unchanged without a teacher, or if its tokens are cached (``top_k``)."""
    if inputs.teacher is None or inputs.teacher.spec.top_k is not None:
        return parts
    splits = [parts.batches, parts.evaluation]
    both = attach(parts.model, inputs.teacher, [inputs.batches, inputs.evaluation], parts.wrapped.autocast)
    if [split.by_document for split in both] == [split.by_document for split in splits]:
        return parts
    batches, evaluation = inputs.batches, inputs.evaluation  # the teacher cannot compute rows laid end to end
    prefetcher = Prefetcher(batches, inputs.device, inputs.total_steps)
    return replace(parts, batches=batches, evaluation=evaluation, prefetcher=prefetcher)


def attach(
    model: torch.nn.Module, teacher: Teacher, splits: list[Batches], autocast: torch.dtype | None
) -> list[Batches]:
    """Load the teacher beside the model; the splits as the teacher can compute them."""
    loaded = teacher.load(next(model.parameters()).device)
    laid = build.resolve_attention(teacher.source, loaded, autocast, *splits)
    build.resolve_lm_head(loaded, autocast, "none")
    teacher_logits.attach(model, loaded)
    return laid


def compute(inputs: Inputs, ranks: Ranks, progress: Progress) -> None:
    """Add the teacher's most likely tokens to the rows that any rank visits."""
    if inputs.teacher is not None and inputs.teacher.spec.top_k is not None:
        compute_rows(inputs.teacher, visited(inputs), inputs.device, ranks, progress)


def visited(inputs: Inputs) -> list[Split]:
    """The packs of all steps and of an evaluation, over all ranks."""
    packs = dict.fromkeys(pack for i in range(inputs.total_steps) for pack in inputs.batches.order.packs_of_step(i))
    return [(inputs.batches, list(packs)), (inputs.evaluation, inputs.evaluation.order.packs_of_pass())]


def missing(inputs: Inputs) -> tuple[int, int, int]:
    """(rows that are not in the cache, their tokens, rows that are visited)"""
    assert inputs.teacher is not None
    absent, tokens, count = 0, 0, 0
    for batches, packs in visited(inputs):
        rows = np.array(batches.rows_in(packs))
        unknown = rows[~Store.of(inputs.teacher, batches.rows, inputs.device).known()[rows]]
        absent, tokens = absent + len(unknown), tokens + int(batches.rows.lengths_of(unknown).sum())
        count += len(rows)
    return absent, tokens, count


def compute_rows(
    teacher: Teacher, splits: Sequence[Split], device: torch.device, ranks: Ranks, progress: Progress
) -> None:
    """Add the tokens to the rows of these splits: from the cache, or from the teacher."""
    stores = [Store.of(teacher, batches.rows, device) for batches, _ in splits]
    lock = stores[0].path.with_name(f"{key_of(teacher, device)}.computing")
    with locked(lock) if ranks.rank == 0 else contextlib.nullcontext():
        ranks.broadcast(None)  # the other ranks wait for rank 0, which has the lock
        absent = [_absent(*split, store) for split, store in zip(splits, stores, strict=True)]
        if ranks.rank == 0:
            count, total = sum(map(len, absent)), sum(len(packs) for _, packs in splits)
            log.info(f"teacher: {total - count} of {total} from the cache, {count} to compute")
        if any(ranks.gather(any(absent))):
            shares = [each[ranks.rank :: ranks.world] for each in absent]
            _write_tokens(teacher, splits, stores, shares, device, progress)
        ranks.broadcast(None)
        # Machines without a common cache have the tokens of their own ranks alone.
        absent = [_absent(*split, store) for split, store in zip(splits, stores, strict=True)]
        if any(absent):
            _write_tokens(teacher, splits, stores, absent, device, progress)
    for (batches, _), store in zip(splits, stores, strict=True):
        batches.rows = replace(batches.rows, of_labels=store.columns())


def _absent(batches: Batches, packs: list[int], store: Store) -> list[int]:
    known = store.known()
    return [pack for pack in packs if not known[batches.rows_of(pack)].all()]


def _write_tokens(
    teacher: Teacher, splits: Sequence[Split], stores: Sequence[Store], shares: Sequence[list[int]],
    device: torch.device, progress: Progress,
) -> None:  # fmt: skip
    """Load the teacher, write the tokens of the packs ``shares`` of each split, and free it."""
    model = teacher.load(device)
    laid = build.resolve_attention(teacher.source, model, None, *(batches for batches, _ in splits))
    build.resolve_lm_head(model, None, "none")
    size = max(1, laid[0].rows_per_batch)
    chunks = [
        (batches, store, share[at : at + size])
        for batches, store, share in zip(laid, stores, shares, strict=True)
        for at in range(0, len(share), size)
    ]
    noted = time.monotonic()
    for number, (batches, store, packs) in enumerate(chunks):
        progress(number, len(chunks))
        batch = wrap.on_device(batches.of(packs), device)
        assert teacher.spec.top_k is not None
        ids, values = teacher_logits.top(model, batch, teacher.spec.top_k, teacher.size)
        store.write(batches.rows_in(packs), ids.cpu().numpy(), values.cpu().numpy())
        if time.monotonic() - noted > NOTED_S:
            store.note()
            noted = time.monotonic()
    for store in stores:
        store.note()
    progress(len(chunks), len(chunks))
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def key_of(teacher: Teacher, device: torch.device) -> str:
    """Hash of everything that determines the tokens but the rows."""
    how = [CODE_VERSION, teacher.identity, teacher.spec.top_k, teacher.size, device.type]
    text = json.dumps([*how, str(dtype_for(teacher.source.dtype, device))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Store:
    """The cached tokens of some rows: two columns of (labels, k), and which rows are known, (rows,) bool.

    The columns are files with holes: rows that are never visited take no room.
    """

    path: Path
    rows: Rows
    count: int
    fresh: list[int]
    """Rows written, but not yet noted as known."""

    @classmethod
    def of(cls, teacher: Teacher, rows: Rows, device: torch.device) -> Store:
        digest = hashlib.sha256(key_of(teacher, device).encode())
        for column in (rows.ids, rows.labels, rows.offsets):
            digest.update(np.ascontiguousarray(column).tobytes())
        assert teacher.spec.top_k is not None
        return cls(cache_dir("teachers") / digest.hexdigest()[:32], rows, teacher.spec.top_k, [])

    @property
    def _shape(self) -> tuple[int, int]:
        return int(self.rows.label_offsets[-1]), self.count

    def _file(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{name}.npy")

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by their names in a batch, memory-mapped."""
        return {name: np.load(self._file(name), mmap_mode="r") for name in DTYPES}

    def known(self) -> np.ndarray:
        """Which rows are known, (rows,); none if a file is missing or damaged."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            known = np.load(self._file("known"))
            if known.shape == (len(self.rows),) and all(c.shape == self._shape for c in self.columns().values()):
                return known
        return np.zeros(len(self.rows), dtype=bool)

    def write(self, rows: list[int], ids: np.ndarray, values: np.ndarray) -> None:
        """Write the tokens of these rows, one after the other; ``note`` makes them known."""
        with locked(self.path.with_suffix(".lock")):
            self._create()
        for (name, dtype), column in zip(DTYPES.items(), (ids, values), strict=True):
            with self._file(name).open("r+b") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                begins, start = file.tell(), 0
                for row in rows:
                    first, end = (int(each) for each in self.rows.label_offsets[row : row + 2])
                    file.seek(begins + first * self.count * dtype.itemsize)
                    file.write(np.ascontiguousarray(column[start : start + end - first], dtype=dtype).tobytes())
                    start += end - first
        self.fresh.extend(rows)

    def note(self) -> None:
        """Note the rows written as known, once they are on the disk; another process may have noted others."""
        if not self.fresh:
            return
        for name in DTYPES:
            with self._file(name).open("r+b") as file:
                os.fsync(file)
        with locked(self.path.with_suffix(".lock")):
            known = self.known()
            known[self.fresh] = True
            content = io.BytesIO()
            np.save(content, known)
            write_atomic(self._file("known"), content.getvalue())
        self.fresh.clear()

    def _create(self) -> None:
        """Empty columns, if there are none of this shape."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            if all(column.shape == self._shape for column in self.columns().values()):
                return
        self._file("known").unlink(missing_ok=True)
        for name, dtype in DTYPES.items():
            self._file(name).unlink(missing_ok=True)  # a process that has mapped the old file keeps it
            column = np.lib.format.open_memmap(self._file(name), "w+", dtype, self._shape)
            column.flush()
