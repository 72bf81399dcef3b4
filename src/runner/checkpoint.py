"""Checkpoints: written aside, flushed to the disk and renamed, so that what has its final name is whole.

A checkpoint holds what cannot be made again: the trainable weights, the optimizer's state and how far the run is.
The schedule, the order of the data and all random numbers are pure functions of (seed, step) and need no saving.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runner.errors import Fault, ResumeError, TrainingError

WEIGHTS, OPTIMIZER, PROGRESS, CHECKSUMS = "trainable.safetensors", "optimizer.pt", "progress.json", "checksums.json"


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


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, the last ``keep`` of them."""

    folder: Path
    keep: int

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write a checkpoint of this step; older ones beyond ``keep`` are removed.

        Raises:
            TrainingError: it could not be written (no space left, no permission); earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{progress.step:06d}"
        aside = self.folder / f".{final.name}.partial"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(_trainable(model), aside / WEIGHTS)
            torch.save(optimizer.state_dict(), aside / OPTIMIZER)
            (aside / PROGRESS).write_text(json.dumps(asdict(progress)))
            sums = {name: _sha256(aside / name) for name in (WEIGHTS, OPTIMIZER, PROGRESS)}
            (aside / CHECKSUMS).write_text(json.dumps(sums))
            for path in (*aside.iterdir(), aside):
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            _flush(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            remedy = "make room (or set outputs_dir elsewhere), then give the same command with this hydra.run.dir"
            raise TrainingError(Fault("", f"cannot write the checkpoint {final}: {error}", remedy)) from error
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest whole checkpoint, or return a fresh Progress where there is none.

        A corrupt or partial checkpoint is skipped with a warning, and the one before is used.
        """
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            problem = _problem(folder)
            if problem:
                warnings.warn(f"checkpoint {folder.name} is skipped: {problem}", stacklevel=2)
                continue
            _load_trainable(model, load_file(folder / WEIGHTS), folder)
            optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
            return Progress(**json.loads((folder / PROGRESS).read_text()))
        return Progress()

    def last_step(self) -> int | None:
        """The step of the newest whole checkpoint, without loading it."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            if not _problem(folder):
                return int(folder.name.removeprefix("step-"))
        return None


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # Tied weights appear once: named_parameters() leaves out what it has shown already.
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _load_trainable(model: torch.nn.Module, saved: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != saved.keys():
        differing = sorted(parameters.keys() ^ saved.keys())[:3]
        problem = f"checkpoint {folder} holds other weights than this configuration trains ({', '.join(differing)}, …)"
        raise ResumeError(Fault("", problem, "start a new run"))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


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
