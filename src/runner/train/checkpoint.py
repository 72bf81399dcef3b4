"""Checkpoints: written aside, flushed to the disk and renamed, so that what has its final name is whole.

A checkpoint holds what cannot be made again: the trainable weights, the optimizer's state and how far the run is.
The schedule, the order of the data and all random numbers are pure functions of (seed, step) and need no saving.
Every rank takes part in saving and restoring, as each may hold but a shard; rank 0 writes and tidies up.
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
from runner.train.distributed.ranks import ALONE, Ranks

WEIGHTS, OPTIMIZER, PROGRESS, CHECKSUMS = "trainable.safetensors", "optimizer.pt", "progress.json", "checksums.json"
COPIED_BYTES, CUDA_COPIED_BYTES = 2**28, 2**31
"""Up to so much is copied, so that training need not wait for the disk; more from a GPU, whose memory is another."""
PARTIAL, BEFORE, DAMAGED = "partial", "before", "damaged"
"""Endings of hidden folders: being written, about to be replaced, found unusable."""


@dataclass
class Progress:
    """How far training is; everything the loop carries from one step to the next."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, padding not counted."""
    trained_tokens: int = 0
    evaluated: bool = False
    """Whether the evaluation that is due at this step has been recorded."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last record of training metrics."""
    timing: dict[str, Any] = field(default_factory=dict)
    """What the steps took, as ``meters.Timing`` has it."""


@dataclass
class Checkpoints:
    """The checkpoints of one run, the last ``keep`` of them, written by a thread while training goes on."""

    folder: Path
    keep: int
    ranks: Ranks = ALONE
    _writing: Future[None] | None = field(default=None, init=False, repr=False)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write a checkpoint of this step, in place of one of the same step; older ones beyond ``keep`` are removed.

        Returns when everything is copied, or on its way from a GPU, or written where the copy would be large;
        ``finish`` waits. What changes the weights next comes after the copy: the device computes in order.

        Raises:
            TrainingError: this one or the one before could not be written (no space left, no permission); earlier
                checkpoints are untouched.
        """
        self.finish()
        leads = self.ranks.rank == 0
        weights = shards.gathered(_trainable(model), keep=leads)
        state = shards.optimizer_state(optimizer, keep=leads)
        final = self.folder / f"step-{progress.step:06d}"
        if not leads:
            return final
        on_gpu = any(tensor.device.type == "cuda" for tensor in weights.values())
        if _bytes(weights) + _bytes(state) > (CUDA_COPIED_BYTES if on_gpu else COPIED_BYTES):
            self._write(final, weights, state, progress)
        else:
            content = (
                _copied(weights),
                _copied(state),
                replace(progress, window=dict(progress.window)),
            )
            arrived = torch.cuda.current_stream().record_event() if on_gpu else None
            self._writing = _in_thread(functools.partial(self._write, final, *content, arrived))
        return final

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        Raises:
            TrainingError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self,
        final: Path,
        weights: dict[str, torch.Tensor],
        state: dict[str, Any],
        progress: Progress,
        arrived: torch.cuda.Event | None = None,
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        aside, before = (self.folder / f".{final.name}.{suffix}" for suffix in (PARTIAL, BEFORE))
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, aside / WEIGHTS)
            torch.save(state, aside / OPTIMIZER)
            (aside / PROGRESS).write_text(json.dumps(asdict(progress)))
            sums = {name: _sha256(aside / name) for name in (WEIGHTS, OPTIMIZER, PROGRESS)}
            (aside / CHECKSUMS).write_text(json.dumps(sums))
            for path in (*aside.iterdir(), aside):
                _flush(path)
            if final.exists():
                final.rename(before)  # a kill from here to the next line costs nothing: `restore` takes it back
            aside.rename(final)
            _flush(self.folder)
            self._prune(progress.step)
        except (OSError, SafetensorError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                self._tidy()
            remedy = "make room (or set outputs_dir elsewhere), then give the same command with this hydra.run.dir"
            raise TrainingError(Fault("", f"cannot write the checkpoint {final}: {error}", remedy)) from error

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest whole checkpoint, or return a fresh Progress where there is none.

        A damaged checkpoint is put aside with a warning, and the one before is used: were it left in its place, it
        would count among those to keep.
        """
        self.finish()
        found = self.ranks.broadcast(self._newest_whole() if self.ranks.rank == 0 else None)
        if found is None:
            return Progress()
        folder = self.folder / found
        _load_trainable(model, load_file(folder / WEIGHTS), folder)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        shards.load_optimizer_state(optimizer, state)
        return Progress(**json.loads((folder / PROGRESS).read_text()))

    def _newest_whole(self) -> str | None:
        """The name of the newest whole checkpoint; damaged ones are put aside."""
        self._tidy()
        for step in self._steps():
            folder = self.folder / f"step-{step:06d}"
            problem = _problem(folder)
            if problem:
                warnings.warn(f"checkpoint {folder.name} is skipped: {problem}", stacklevel=2)
                damaged = folder.with_name(f".{folder.name}.{DAMAGED}")
                shutil.rmtree(damaged, ignore_errors=True)
                folder.rename(damaged)
                continue
            return folder.name
        return None

    def _steps(self) -> list[int]:
        """The steps of which there are checkpoints, whole or damaged, the newest first."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _tidy(self) -> None:
        """Finish what a kill left half done: a checkpoint that was to be replaced, and one that was being written."""
        for before in self.folder.glob(f".step-*.{BEFORE}"):
            final = before.with_name(before.name[1:].removesuffix(f".{BEFORE}"))
            shutil.rmtree(before, ignore_errors=True) if final.exists() else before.rename(final)
        for partial in self.folder.glob(f".step-*.{PARTIAL}"):
            shutil.rmtree(partial, ignore_errors=True)

    def _prune(self, written: int) -> None:
        """Remove what the checkpoint of step ``written`` makes superfluous; never that one, nor a later one."""
        for step in [step for step in self._steps() if step < written][self.keep - 1 :]:
            shutil.rmtree(self.folder / f"step-{step:06d}", ignore_errors=True)
        for aside in (*self.folder.glob(f".step-*.{BEFORE}"), *self.folder.glob(f".step-*.{DAMAGED}")):
            if int(aside.name.split("-")[1].partition(".")[0]) <= written:
                shutil.rmtree(aside, ignore_errors=True)


def _in_thread(write: Callable[[], None]) -> Future[None]:
    """Run it in a thread that the process waits for when it ends."""
    pool = ThreadPoolExecutor(1, "checkpoint")
    writing = pool.submit(write)
    pool.shutdown(wait=False)
    return writing


def _copied(content: Any) -> Any:
    """The same, its tensors copied to the CPU, or on their way there from a GPU."""
    if isinstance(content, torch.Tensor):
        if content.device.type == "cuda":
            pinned = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)
            return pinned.copy_(content.detach(), non_blocking=True)
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list) else content


def _bytes(content: Any) -> int:
    if isinstance(content, torch.Tensor):
        return content.nbytes
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return sum(map(_bytes, values))


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # Tied weights appear once: named_parameters() leaves out what it has shown already.
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _load_trainable(model: torch.nn.Module, saved: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != saved.keys():
        differing = sorted(parameters.keys() ^ saved.keys())[:3]
        problem = f"checkpoint {folder} holds other weights than this configuration trains ({', '.join(differing)}, …)"
        raise ResumeError(Fault("", problem, "start a new run"))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shards.like(parameter, saved[name]))


def _problem(folder: Path) -> str:
    """Why the checkpoint cannot be used; empty where it can."""
    try:
        sums: dict[str, Any] = json.loads((folder / CHECKSUMS).read_text())
        wrong = [name for name, expected in sums.items() if _sha256(folder / name) != expected]
    except (OSError, ValueError) as error:
        return f"it is not whole ({error})"
    return f"{', '.join(wrong)} changed since it was written" if wrong else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
