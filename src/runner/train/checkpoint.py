"""Checkpoints, written atomically: to a hidden folder, fsync, then rename; a folder with its final name is complete.

A checkpoint contains the trainable weights, their averages (``ema``), the optimizer state and the progress. The
schedule, the order of the data and all random numbers are pure functions of (seed, step) and are not saved. All ranks
take part in saving and restoring, because each may have only a shard; rank 0 writes and deletes files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runner.errors import Fault, ResumeError, TrainingError
from runner.models import shards
from runner.tracking.rundir import PROGRESS
from runner.train.distributed import wrap
from runner.train.distributed.ranks import ALONE, Ranks
from runner.train.ema import Average

WEIGHTS, AVERAGES = "trainable.safetensors", "averages.safetensors"
OPTIMIZER, CHECKSUMS = "optimizer.pt", "checksums.json"
COPIED_BYTES, CUDA_COPIED_BYTES = 2**28, 2**31
"""Up to this size a checkpoint is copied and written in the background; GPU tensors are copied to CPU memory."""
PARTIAL, BEFORE, DAMAGED = "partial", "before", "damaged"
"""Suffixes of hidden folders: being written, being replaced, damaged."""


@dataclass
class Progress:
    """Position of training: the state that the loop carries from one step to the next."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, without padding."""
    trained_tokens: int = 0
    evaluated: bool = False
    """Whether the evaluation that is due at this step has been recorded."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last record of training metrics."""
    timing: dict[str, Any] = field(default_factory=dict)
    """Fields of ``throughput.Timing``."""
    best_step: int = 0
    """Step of the best evaluation, whose checkpoint is kept; 0: none is selected."""
    best_value: float | None = None
    without_gain: int = 0
    """Evaluations since one that was better."""
    high_losses: int = 0
    """Steps since the loss was low enough."""
    ended: str = ""
    """Why training ends at this step, before its last one."""


@dataclass
class Checkpoints:
    """The last ``keep`` checkpoints of a run, written by a background thread."""

    folder: Path
    keep: int
    ranks: Ranks = ALONE
    average: Average = field(default_factory=Average)
    _writing: Future[None] | None = field(default=None, init=False, repr=False)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write a checkpoint of this step, replace one of the same step, and delete old ones beyond ``keep``.

        Small checkpoints are copied and written in the background (call ``finish`` to wait), large ones are written
        before returning. A GPU copy is asynchronous, but in stream order: later updates do not change it.

        Raises:
            TrainingError: this or the previous checkpoint cannot be written (disk full, no permission); earlier
                checkpoints are unchanged.
        """
        self.finish()
        leads = self.ranks.rank == 0
        weights = {WEIGHTS: shards.gathered(_trainable(model), keep=leads)}
        if averages := self.average.values():
            weights[AVERAGES] = shards.gathered(averages, keep=leads)
        state = shards.optimizer_state(optimizer, keep=leads)
        final = self.folder / f"step-{progress.step:06d}"
        if not leads:
            return final
        on_gpu = any(tensor.device.type == "cuda" for tensor in weights[WEIGHTS].values())
        if _bytes(weights) + _bytes(state) > (CUDA_COPIED_BYTES if on_gpu else COPIED_BYTES):
            self._write(final, weights, state, progress)
        else:
            content = _copied(weights), _copied(state), replace(progress, window=dict(progress.window))
            arrived = torch.cuda.current_stream().record_event() if on_gpu else None
            self._writing = _in_thread(functools.partial(self._write, final, *content, arrived))
        return final

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            TrainingError: the checkpoint cannot be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self,
        final: Path,
        weights: dict[str, dict[str, torch.Tensor]],
        state: dict[str, Any],
        progress: Progress,
        arrived: torch.cuda.Event | None = None,
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        aside, before = (self.folder / f".{final.name}.{suffix}" for suffix in (PARTIAL, BEFORE))
        try:
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)  # not its parents: a removed run folder is not created again
            aside.mkdir()
            for file, tensors in weights.items():
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside / file)
            torch.save(state, aside / OPTIMIZER)
            (aside / PROGRESS).write_text(json.dumps(asdict(progress)))
            sums = {name: _sha256(aside / name) for name in (*weights, OPTIMIZER, PROGRESS)}
            (aside / CHECKSUMS).write_text(json.dumps(sums))
            for path in (*aside.iterdir(), aside):
                _flush(path)
            if final.exists():
                final.rename(before)  # if killed before the next line, `_tidy` renames it back
            aside.rename(final)
            _flush(self.folder)
            self._prune(progress)
        except (OSError, SafetensorError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                self._tidy()
            remedy = (
                "free disk space (or set outputs_dir to another disk), then repeat the command with this hydra.run.dir"
            )
            raise TrainingError(Fault("", f"cannot write the checkpoint {final}: {error}", remedy)) from error

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest valid checkpoint and return its progress, or a new Progress if there is no checkpoint.

        A damaged checkpoint is renamed with a warning, so that it does not count for ``keep``, and the previous
        checkpoint is loaded.
        """
        self.finish()
        newest = self.ranks.broadcast(self._newest_valid() if self.ranks.rank == 0 else None)
        if newest is None:
            return Progress()
        folder = self.folder / newest
        _load(_trainable(model), folder / WEIGHTS)
        if self.average.weights:
            _load(self.average.weights, folder / AVERAGES)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        shards.load_optimizer_state(optimizer, state)
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
        self.forget_lost_best(progress)
        return progress

    def forget_lost_best(self, progress: Progress) -> None:
        """Forget the best step if its checkpoint is lost or damaged, with a warning."""
        folder = self.folder / f"step-{progress.best_step:06d}"
        problem = _problem(folder) if self.ranks.rank == 0 and progress.best_step else ""
        if problem := self.ranks.broadcast(problem):
            warnings.warn(f"the checkpoint of the best step, {folder.name}, is lost: {problem}", stacklevel=2)
            progress.best_step, progress.best_value = 0, None

    def restore_result(self, model: torch.nn.Module, progress: Progress) -> None:
        """Give the model the weights that are the result: those of the best step, if one is selected, or averages."""
        self.finish()
        self.forget_lost_best(progress)
        wrap.reshard(model)
        self.average.give()
        if progress.best_step not in (0, progress.step):
            folder = self.folder / f"step-{progress.best_step:06d}"
            _load(_trainable(model), folder / (AVERAGES if self.average.is_kept else WEIGHTS))

    def _newest_valid(self) -> str | None:
        """The name of the newest valid checkpoint; renames damaged ones."""
        self._tidy()
        for step in self._steps():
            folder = self.folder / f"step-{step:06d}"
            problem = _problem(folder)
            if problem:
                warnings.warn(f"skipping checkpoint {folder.name}: {problem}", stacklevel=2)
                damaged = folder.with_name(f".{folder.name}.{DAMAGED}")
                shutil.rmtree(damaged, ignore_errors=True)
                folder.rename(damaged)
                continue
            return folder.name
        return None

    def _steps(self) -> list[int]:
        """Steps of all checkpoints, damaged ones included, newest first."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _tidy(self) -> None:
        """Clean up after a kill: restore a checkpoint that was being replaced, delete one that was being written."""
        for before in self.folder.glob(f".step-*.{BEFORE}"):
            final = before.with_name(before.name[1:].removesuffix(f".{BEFORE}"))
            shutil.rmtree(before, ignore_errors=True) if final.exists() else before.rename(final)
        for partial in self.folder.glob(f".step-*.{PARTIAL}"):
            shutil.rmtree(partial, ignore_errors=True)

    def _prune(self, progress: Progress) -> None:
        """Delete checkpoints older than this one beyond ``keep``, except the best, and hidden folders up to it."""
        written, older = progress.step, [step for step in self._steps() if step < progress.step]
        for step in [step for step in older[self.keep - 1 :] if step != progress.best_step]:
            shutil.rmtree(self.folder / f"step-{step:06d}", ignore_errors=True)
        for aside in (*self.folder.glob(f".step-*.{BEFORE}"), *self.folder.glob(f".step-*.{DAMAGED}")):
            if int(aside.name.split("-")[1].partition(".")[0]) <= written:
                shutil.rmtree(aside, ignore_errors=True)


def _in_thread(write: Callable[[], None]) -> Future[None]:
    """Run ``write`` in a thread; the process waits for the thread before it exits."""
    pool = ThreadPoolExecutor(1, "checkpoint")
    writing = pool.submit(write)
    pool.shutdown(wait=False)
    return writing


def _copied(content: Any) -> Any:
    """Copy all tensors of a nested structure to the CPU; copies from a GPU are asynchronous."""
    if isinstance(content, torch.Tensor):
        if content.device.type == "cuda":
            pinned = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)
            return pinned.copy_(content.detach(), non_blocking=True)
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list) else content


def _bytes(content: Any) -> int:
    """Total bytes of the tensors in a nested structure."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return sum(map(_bytes, values))


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # Tied weights appear once: named_parameters() skips duplicates.
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _load(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Give the tensors the values of a file, which must have the same names."""
    saved = load_file(file) if file.is_file() else {}
    if tensors.keys() != saved.keys():
        differing = sorted(tensors.keys() ^ saved.keys())[:3]
        problem = f"checkpoint {file.parent} does not match the trainable parameters ({', '.join(differing)}, …)"
        raise ResumeError(Fault("", problem, "start a new run"))
    for name, tensor in tensors.items():
        tensor.copy_(shards.like(tensor, saved[name]))


def _problem(folder: Path) -> str:
    """Why the checkpoint cannot be used; empty if it is valid."""
    try:
        sums: dict[str, Any] = json.loads((folder / CHECKSUMS).read_text())
        wrong = [name for name, expected in sums.items() if _sha256(folder / name) != expected]
    except (OSError, ValueError) as error:
        return f"it is incomplete ({error})"
    return f"checksum of {', '.join(wrong)} does not match" if wrong else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
