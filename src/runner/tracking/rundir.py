"""The run folder: the only place that names the files of a run, and the only one that writes its state.

.hydra/ config.yaml manifest.json state.json metrics.jsonl system.jsonl samples.json train.log checkpoints/ model/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from runner.errors import ConfigError, Fault
from runner.files import is_held, locked, write_atomic

Status = Literal["pending", "running", "preempted", "completed", "failed", "killed", "pruned"]
DONE: tuple[Status, ...] = ("completed", "pruned")
"""Nothing is left to do."""
FINAL: tuple[Status, ...] = (*DONE, "failed", "killed")
"""It goes on only if somebody asks for that."""
UNFINISHED: tuple[Status, ...] = ("pending", "running", "preempted", "killed")
DIED = "the process died without saying so (killed, or out of memory)"
"""The reason that others write down for a worker which could not."""


@dataclass(frozen=True)
class State:
    """What state.json says: how far the run is and how it ended."""

    status: Status = "pending"
    step: int = 0
    total_steps: int = 0
    attempt: int = 0
    reason: str = ""
    """Why it stopped, in one line; empty while it runs and after success."""
    pid: int = 0
    host: str = ""
    scheduler_id: str = ""
    started: float = 0.0
    """Seconds since the epoch at which the first attempt began."""
    updated: float = 0.0
    seconds: float = 0.0
    """Spent on training, all attempts together; the hours in between do not count."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The numbers shown at the end: metric name → value."""


@dataclass(frozen=True)
class RunDir:
    """Every path of one run hangs off this object."""

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
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def system(self) -> Path:
        """Samples of CPU, memory and GPU by time, in the form of metrics.jsonl."""
        return self.path / "system.jsonl"

    @property
    def samples(self) -> Path:
        """Generations before and after: a list of {prompt, reference, before, after}."""
        return self.path / "samples.json"

    @property
    def evaluations(self) -> Path:
        """What ``evaluate`` found after training: a line {time, step, name, rows, data, metrics, …} each time."""
        return self.path / "evaluations.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    def rank_log(self, rank: int) -> Path:
        """The log of one process of the run; that of rank 0 is ``log``."""
        return self.log if rank == 0 else self.path / f"train.rank-{rank}.log"

    def rank_failure(self, rank: int) -> Path:
        """Why a rank beyond 0 failed, in its own words; rank 0 makes it the run's reason."""
        return self.path / f".failure.rank-{rank}"

    @property
    def terminal_log(self) -> Path:
        """What the run would have told the terminal, which a sweep keeps for its table."""
        return self.path / "terminal.log"

    @property
    def queue_lock(self) -> Path:
        """Held by the queue that has taken on this run, from before its worker comes to life until its end is known."""
        return self.path / ".queue.lock"

    @property
    def cancel_request(self) -> Path:
        """Lies here from the moment somebody cancels the run until it is handed over again; its text is the reason."""
        return self.path / ".cancel"

    @property
    def prune_request(self) -> Path:
        """Lies here once a search has given the run up, until somebody asks for it anew; its text is the reason."""
        return self.path / ".prune"

    @property
    def mirror_log(self) -> Path:
        """What the process that mirrors this folder into MLflow had to say."""
        return self.path / "mirror.log"

    @property
    def mirror_report(self) -> Path:
        """What that process has sent and what it has not: {sent, unsent, problem}."""
        return self.path / "mirror.json"

    @property
    def mirror_lock(self) -> Path:
        """Held by the process that mirrors this folder: there is never more than one."""
        return self.path / ".mirror.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def dirty_diff(self) -> Path:
        """``git diff HEAD`` at the start, where the working tree was dirty."""
        return self.path / "dirty.diff"

    @property
    def lock(self) -> Path:
        return self.path / "worker.lock"

    def read_state(self) -> State:
        """The state; ``pending`` where none was written yet."""
        return State(**json.loads(self.state.read_text())) if self.state.exists() else State()

    def write_state(self, **changes: Any) -> State:
        """Change some fields of the state, atomically."""
        state = State(**{**asdict(self.read_state()), **changes, "updated": time.time()})
        write_atomic(self.state, json.dumps(asdict(state), indent=1))
        return state

    def forget_cancel(self) -> None:
        """Drop the request to cancel the run: it is handed over again. A worker that is ending still needs it."""
        if not self.is_alive():
            self.cancel_request.unlink(missing_ok=True)

    def forget_requests(self) -> None:
        """Drop what asked to end the run, as ``forget_cancel`` does, and what gave it up: somebody wants it anew."""
        self.forget_cancel()
        if not self.is_alive():
            self.prune_request.unlink(missing_ok=True)

    def read_manifest(self) -> dict[str, Any]:
        return dict(json.loads(self.manifest.read_text())) if self.manifest.exists() else {}

    def update_manifest(self, **changes: Any) -> dict[str, Any]:
        """Add to the manifest under a lock: the submitter, the worker and the mirror all do."""
        with locked(self.path / ".manifest.lock"):
            manifest = {**self.read_manifest(), **changes}
            write_atomic(self.manifest, json.dumps(manifest, indent=1, default=str))
        return manifest

    def discard(self, made: Iterable[Path] | None = None) -> None:
        """Remove what this run wrote, and the folders that were made for it: it was refused before it started.

        ``made``: those folders, innermost first; None: as its manifest says.
        """
        made = [Path(path) for path in self.read_manifest().get("made_folders", [])] if made is None else made
        for entry in list(self.path.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: another run is in it
                folder.rmdir()

    def saved_step(self) -> int:
        """The step from which this run would be continued; 0 where nothing is saved yet."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)

    def is_alive(self) -> bool:
        """Whether a worker holds this folder; a worker that was killed holds it no more."""
        return is_held(self.lock)

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the folder for this worker while the block runs; yields False where another worker holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.open("a") as handle:
            for attempt in range(10):  # who only looks whether a worker lives holds the lock for an instant
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05 if attempt < 9 else 0)
                    continue
                yield True
                return
            yield False


def find_runs(folder: Path) -> list[RunDir]:
    """The run folder itself, or all run folders below it, oldest name first.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for place, below, files in os.walk(folder.absolute()):
        below.sort()
        if "state.json" in files:
            below.clear()
            found.append(RunDir(Path(place)))
    if not found:
        raise ConfigError(Fault("", f"{folder} holds no run", "name a run folder, or a folder of run folders"))
    return found
