"""Paths, state and manifest of a run folder. No other module contains the file names of a run.

.hydra/ config.yaml manifest.json state.json metrics.jsonl system.jsonl samples.json train.log checkpoints/ model/
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner import terminal
from runner.errors import DamagedError, Fault
from runner.files import is_held, locked, read_kept, write_kept
from runner.tracking import state_file
from runner.tracking.state_file import State

PROGRESS = "progress.json"
"""File of a checkpoint with the position of training."""
WITHOUT_MANIFEST = (
    "restore it, for example from the artifacts of the run in MLflow: only it has the id of the run, its command, the "
    "versions and the digest of the data; without it, its log and model/ can still be used"
)


@dataclass(frozen=True)
class RunDir:
    """A run folder: its paths, state and manifest."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def manifest_lock(self) -> Path:
        """Lock held while a process changes manifest.json."""
        return self.path / ".manifest.lock"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def code(self) -> Path:
        """The copy of the user's own code."""
        return self.path / "code"

    @property
    def start(self) -> Path:
        """The copy of the adapter that training starts from (``lora.start``)."""
        return self.path / "start"

    @property
    def eva(self) -> Path:
        """The first lora_A of an adapter that begins with directions of the data (``lora.init_lora_weights=eva``)."""
        return self.path / "eva.safetensors"

    @property
    def loftq(self) -> Path:
        """What an adapter with ``lora.init_lora_weights=loftq`` began with, and the base that it belongs to."""
        return self.path / "loftq.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def system(self) -> Path:
        """Samples of CPU, memory and GPU over time, in the format of metrics.jsonl."""
        return self.path / "system.jsonl"

    @property
    def samples(self) -> Path:
        """Generations before and after training: a list of {prompt, reference, before, after}."""
        return self.path / "samples.json"

    @property
    def rollouts(self) -> Path:
        """A file for each evaluation of a task whose answers the model writes: answers with their rewards."""
        return self.path / "rollouts"

    @property
    def answers(self) -> Path:
        """A file for each evaluation with ``train.metrics``: answers to held-out prompts with their scores."""
        return self.path / "answers"

    @property
    def evaluations(self) -> Path:
        """Results of the command ``evaluate``: one line {time, step, name, rows, data, metrics, …} per call."""
        return self.path / "evaluations.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    def rank_log(self, rank: int) -> Path:
        """The log of one rank; rank 0 writes to ``log``."""
        return self.log if rank == 0 else self.path / f"train.rank-{rank}.log"

    def rank_failure(self, rank: int) -> Path:
        """Error message of a failed rank > 0; rank 0 copies it into the reason in state.json."""
        return self.path / f".failure.rank-{rank}"

    @property
    def terminal_log(self) -> Path:
        """Terminal output of a run in a sweep, whose terminal shows the progress table instead."""
        return self.path / "terminal.log"

    @property
    def queue_lock(self) -> Path:
        """Lock held by the local queue that runs this run, from before the worker starts until its end is recorded."""
        return self.path / ".queue.lock"

    @property
    def cancel_request(self) -> Path:
        """Marker file: a cancel was requested. Contains the reason; removed when the run is launched again."""
        return self.path / ".cancel"

    @property
    def prune_request(self) -> Path:
        """Marker file: a search pruned the run. Contains the reason; removed when the user launches the run again."""
        return self.path / ".prune"

    @property
    def mirror_log(self) -> Path:
        """Log of the process that uploads this folder to MLflow."""
        return self.path / "mirror.log"

    @property
    def mirror_report(self) -> Path:
        """Progress of the upload: {sent, unsent, problem, uploaded}; ``uploaded``: ``updated`` of that state."""
        return self.path / "mirror.json"

    @property
    def mirror_lock(self) -> Path:
        """Lock held by the process that uploads this folder; at most one process does."""
        return self.path / ".mirror.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def profile(self) -> Path:
        """Traces of some steps (``train.profile``)."""
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        """The event file of ``tracking.also=[tensorboard]``."""
        return self.path / "tensorboard"

    @property
    def dirty_diff(self) -> Path:
        """``git diff HEAD`` at the start of the run; written only if there were uncommitted changes."""
        return self.path / "dirty.diff"

    @property
    def lock(self) -> Path:
        return self.path / "worker.lock"

    def read_state(self) -> State:
        """Contents of state.json; the status is ``pending`` if the run is not prepared yet.

        Raises:
            DamagedError: the file is damaged, or lost: manifest.json is written after it.
        """
        remedy = f"python -m runner {terminal.typed(self.path, 'resume')} rebuilds it from the checkpoints"
        try:
            return state_file.read(self.state, remedy)
        except FileNotFoundError:
            if self.manifest.exists():
                raise DamagedError(Fault("", f"{self.state} is missing", remedy)) from None
            return State()

    def write_state(self, **changes: Any) -> State:
        """Change some fields of state.json, atomically."""
        before = self.read_state() if self.state.exists() else State()
        return state_file.write(self.state, replace(before, **changes))

    def forget_cancel(self) -> None:
        """Remove the cancel request before the run is launched again. Kept while a worker runs: it reads the file."""
        if not self.is_alive():
            self.cancel_request.unlink(missing_ok=True)

    def forget_requests(self) -> None:
        """Remove the cancel and the prune request before the user launches the run again."""
        self.forget_cancel()
        if not self.is_alive():
            self.prune_request.unlink(missing_ok=True)

    def read_manifest(self) -> dict[str, Any]:
        """Contents of manifest.json, restored from its copy if it is damaged; empty if the run is not prepared yet.

        Raises:
            DamagedError: the file and its copy are damaged.
        """
        return self._manifest(self.manifest_lock)

    def _manifest(self, lock: Path | None) -> dict[str, Any]:
        try:
            return read_kept(self.manifest, WITHOUT_MANIFEST, lock)
        except FileNotFoundError:
            return {}

    def update_manifest(self, **changes: Any) -> dict[str, Any]:
        """Add keys to manifest.json, under a lock: submitter, worker and upload process all write this file.

        Raises:
            DamagedError: the file and its copy are damaged.
        """
        with locked(self.manifest_lock):
            manifest = {**self._manifest(None), **changes}
            write_kept(self.manifest, manifest)
        return manifest

    def saved_step(self) -> int:
        """Step of the latest checkpoint; 0 if there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)

    def identity(self) -> tuple[int, int]:
        """Device and inode of the worker lock, which differ once the folder is removed and created again."""
        try:
            stat = self.lock.stat()
        except OSError:
            return 0, 0
        return stat.st_dev, stat.st_ino

    def is_alive(self) -> bool:
        """Whether a worker process holds the lock of this folder (the lock is released when the process dies)."""
        return is_held(self.lock)

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the worker lock of the folder inside the ``with`` block; yields False if another worker holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.open("a") as handle:
            for attempt in range(10):  # is_alive of another process holds the lock for an instant
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05 if attempt < 9 else 0)
                    continue
                yield True
                return
            yield False
