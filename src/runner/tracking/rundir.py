"""Paths and state of a run folder. No other module contains the file names of a run or writes state.json.

.hydra/ config.yaml manifest.json state.json metrics.jsonl system.jsonl samples.json train.log checkpoints/ model/
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from runner.config import bounds
from runner.errors import ConfigError, DamagedError, Fault, quoted
from runner.files import copy_of, is_held, locked, read_json, read_kept, restore_lost, write_atomic, write_kept

Status = Literal["pending", "running", "preempted", "completed", "failed", "killed", "pruned"]
DONE: tuple[Status, ...] = ("completed", "pruned")
"""The run has ended for good."""
FINAL: tuple[Status, ...] = (*DONE, "failed", "killed")
"""The run continues only after a request of the user."""
UNFINISHED: tuple[Status, ...] = ("pending", "running", "preempted", "killed")
PROGRESS = "progress.json"
"""File of a checkpoint with the position of training."""
DIED = "worker killed (SIGKILL or out of memory)"
"""Reason that another process writes to state.json if the worker was killed before it could write its own."""

MANIFEST_LOCK = ".manifest.lock"
WITHOUT_MANIFEST = (
    "restore it, for example from the artifacts of the run in MLflow: only it has the id of the run, its command, the "
    "versions and the digest of the data; without it, its log and model/ can still be used"
)


@dataclass(frozen=True)
class State:
    """Contents of state.json: progress of the run and how it ended."""

    status: Status = "pending"
    step: int = 0
    total_steps: int = 0
    attempt: int = 0
    reason: str = ""
    """Why the run stopped, in one line; empty while it runs and after its last step."""
    pid: int = 0
    host: str = ""
    scheduler_id: str = ""
    started: float = 0.0
    """Start of the first attempt, in seconds since the epoch."""
    updated: float = 0.0
    seconds: float = 0.0
    """Training time of all attempts; the time between attempts is not counted."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Final numbers of the run: metric name → value."""

    @property
    def model_step(self) -> int:
        """The step whose weights are in the folder ``model``: the best one if one was selected, else the last."""
        return int(self.summary.get("best step") or self.step)

    def remaining_s(self) -> float | None:
        """Seconds until the last step, at the average speed so far; None before the first step."""
        if not self.step or not self.seconds:
            return None
        remaining = self.seconds / self.step * (self.total_steps - self.step)
        return max(0.0, remaining - max(0.0, time.time() - self.updated))  # the clock of another machine may be ahead


@functools.cache
def _kinds() -> dict[str, Any]:
    """Field of ``State`` → its type."""
    return get_type_hints(State)


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
        """Progress of the upload: {sent, unsent, problem, told}; ``told``: ``updated`` of the uploaded state."""
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
        remedy = f"python -m runner resume={self.path} rebuilds it from the checkpoints"
        try:
            content = read_json(self.state, remedy)
        except FileNotFoundError:
            if self.manifest.exists():
                raise DamagedError(Fault("", f"{self.state} is missing", remedy)) from None
            return State()
        unknown = ", ".join(content.keys() - State.__annotations__.keys())
        wrong = [key for key, kind in _kinds().items() if key in content and not bounds.fits(content[key], kind)]
        if unknown or content.get("status") not in get_args(Status) or wrong:
            what = f"unknown keys: {unknown}" if unknown else f"unknown status {content.get('status')!r}"
            what = f"{wrong[0]} is {quoted(content[wrong[0]])}" if wrong and wrong != ["status"] else what
            raise DamagedError(Fault("", f"{self.state} is damaged: {what}", remedy))
        return State(**content)

    def write_state(self, **changes: Any) -> State:
        """Change some fields of state.json, atomically."""
        before = self.read_state() if self.state.exists() else State()
        return self._write(State(**{**asdict(before), **changes}))

    def rebuild_state(self) -> str:
        """Write a new state.json from the checkpoints if the file is lost or damaged; returns what was wrong with it.

        Only without a worker. The rebuilt status is killed, or pending without a trace of training.
        """
        try:
            self.read_state()
            return ""
        except DamagedError as error:
            problem = error.faults[0].problem
        step = self.saved_step()
        seconds = 0.0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((self.checkpoints / f"step-{step:06d}" / PROGRESS).read_text())
            seconds = float(saved["timing"]["seconds"])
        if not step and not self.metrics.exists():
            self._write(State())
        else:
            source = f"the checkpoint of step {step}" if step else "metrics.jsonl"
            reason = f"state.json was lost or damaged; rebuilt from {source}"
            started = self.metrics.stat().st_ctime - seconds if self.metrics.exists() else 0.0
            self._write(State("killed", step, attempt=1, reason=reason, started=started, seconds=seconds))
        return problem

    def _write(self, state: State) -> State:
        state = replace(state, updated=time.time())
        write_atomic(self.state, json.dumps(asdict(state), indent=1))
        return state

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
        return self._manifest(self.path / MANIFEST_LOCK)

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
        with locked(self.path / MANIFEST_LOCK):
            manifest = {**self._manifest(None), **changes}
            write_kept(self.manifest, manifest)
        return manifest

    def restore_manifest(self) -> None:
        """Write a lost manifest.json again from its copy, with a warning.

        Raises:
            DamagedError: a run that has begun has lost both.
        """
        restore_lost(self.manifest, self.path / MANIFEST_LOCK)
        if not self.manifest.exists() and self.config.exists() and (self.metrics.exists() or self.checkpoints.exists()):
            raise DamagedError(Fault("", f"{self.manifest} is lost", WITHOUT_MANIFEST))

    def discard(self, folders: Iterable[Path] | None = None) -> None:
        """Remove the files of a run that was refused before it started, and the folders created for it.

        ``folders``: the created folders, innermost first; None: read them from the manifest.
        """
        if folders is None:
            folders = [Path(path) for path in self.read_manifest().get("made_folders", [])]
        copy_of(self.manifest).unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)  # before the state: a manifest without a state would count as damaged
        for entry in list(self.path.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for folder in folders:
            with contextlib.suppress(OSError):  # not empty: contains another run
                folder.rmdir()

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


def find_runs(folder: Path) -> list[RunDir]:
    """``folder`` if it is a run folder, else all run folders below it, sorted by path.

    Raises:
        ConfigError: no run folder there.
    """
    rundirs = []
    for path, subfolders, files in os.walk(folder.absolute()):
        subfolders[:] = sorted(name for name in subfolders if name != "mlartifacts")  # copies of manifests
        if {"state.json", "manifest.json"} & set(files):
            subfolders.clear()
            rundirs.append(RunDir(Path(path)))
    if not rundirs:
        raise ConfigError(Fault("", f"{folder} contains no run", "name a run folder, or a folder with run folders"))
    return rundirs
