"""Paths of a sweep folder, which contains sweep.json and one folder per run. No other module names its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import Fault, LaunchError, ResumeError, RunnerError
from runner.files import is_held, locked, read_kept, write_kept
from runner.tracking.rundir import RunDir

PATTERNS = {"%": "'%'", "\\": "'\\'", "\n": "a line break", "\r": "a line break"}
"""Characters that Slurm and submitit do not take literally in the path of a log file, and their names."""


@dataclass(frozen=True)
class SweepDir:
    """A sweep folder: its paths, sweep.json and its runs."""

    path: Path

    @property
    def manifest(self) -> Path:
        """{id, name, created, commands, mlflow: {parent_run_id, …}, jobs: {signature: {folder, label}}}"""
        return self.path / "sweep.json"

    @property
    def lock(self) -> Path:
        """Lock held while a process reads and changes sweep.json."""
        return self.path / ".sweep.lock"

    @property
    def queue_lock(self) -> Path:
        """Shared lock held by every local queue that runs this sweep."""
        return self.path / ".queue.lock"

    @property
    def cancel_request(self) -> Path:
        """Marker file: the search was cancelled and proposes no more runs; removed when the search continues."""
        return self.path / ".cancel"

    @property
    def search_lock(self) -> Path:
        """Lock held by the process that proposes the runs of this search; at most one process does."""
        return self.path / ".search.lock"

    @property
    def search_journal(self) -> Path:
        """Journal of the Optuna study: proposed trials and reported results, one per line."""
        return self.path / "search.journal"

    @property
    def mlflow_lock(self) -> Path:
        """Lock held while a process creates the sweep's runs in MLflow or updates their parent run."""
        return self.path / ".mlflow.lock"

    @property
    def mirror_lock(self) -> Path:
        """Lock held by the process that uploads all runs of this sweep; a second process waits for the first to end."""
        return self.path / ".mirror.lock"

    @property
    def mirror_log(self) -> Path:
        return self.path / "mirror.log"

    @property
    def mirror_report(self) -> Path:
        """Progress of the upload: {pid, opened, incomplete, problem}; ``incomplete``: ended runs not fully uploaded."""
        return self.path / "mirror.json"

    def is_worked_on(self) -> bool:
        """Whether a local queue runs this sweep, or a worker forked by a queue that was killed since."""
        return is_held(self.queue_lock, shared=True)

    def read(self, *, is_locked: bool = False) -> dict[str, Any]:
        """Contents of sweep.json, restored from its copy if it is damaged; empty if there is no such file.

        Args:
            is_locked: the caller holds the lock.

        Raises:
            DamagedError: the file and its copy are damaged.
        """
        try:
            remedy = "restore it; each of its runs can still be used by the path of its folder"
            return read_kept(self.manifest, remedy, None if is_locked else self.lock)
        except FileNotFoundError:
            return {}

    def update(self, **changes: Any) -> dict[str, Any]:
        """Change keys of sweep.json under its lock; returns the new contents."""
        with locked(self.lock):
            manifest = {**self.read(is_locked=True), **changes}
            write_kept(self.manifest, manifest)
        return manifest

    def rundirs(self) -> list[RunDir]:
        """The runs of the sweep, in the order of sweep.json."""
        return [RunDir(self.path / job["folder"]) for job in self.read().get("jobs", {}).values()]


def slurm_room(home: Path) -> Path:
    """Folder for the files of submitit and Slurm (submissions, scripts, output) of a sweep or a single run."""
    return home / "slurm"


def refuse_slurm_room(folder: Path) -> None:
    """Refuse a run folder that cannot contain the log files of a job."""
    if names := {name: None for character, name in PATTERNS.items() if character in str(folder)}:
        problem = f"contains {' and '.join(names)}, which Slurm replaces in the paths of log files"
        remedy = "choose another folder with outputs_dir, hydra.run.dir or sweep"
        raise LaunchError(Fault("launcher", f"the run folder {problem}: {str(folder)!r}", remedy, "slurm"))


def home_of(rundir: RunDir) -> Path:
    """The folder from which a run is submitted: the folder of its sweep, or its own folder."""
    sweep = sweep_of(rundir)
    return sweep.path if sweep else rundir.path


def sweep_of(rundir: RunDir) -> SweepDir | None:
    """The sweep of a run; None for a single run.

    The sweep is the nearest one above: no other run or sweep can be created inside the folder of a sweep.
    """
    sweep = enclosing(rundir.path)
    if sweep is None or sweep.path == rundir.path.parent:
        return sweep
    return sweep if any(rundir.path.absolute() == each.path.absolute() for each in _runs(sweep)) else None


def enclosing(folder: Path) -> SweepDir | None:
    """The sweep whose folder contains this one, which need not be one of its runs."""
    return next((SweepDir(each) for each in folder.parents if (each / "sweep.json").exists()), None)


def refuse_inside(folder: Path, key: str) -> None:
    """Refuse a new run or sweep inside the folder of a sweep: status, sync and compare would not see it."""
    if sweep := enclosing(folder.absolute()):
        problem = f"is inside the folder of the sweep {sweep.path}"
        raise ResumeError(Fault(key, problem, "choose another name or folder", folder))


def _runs(sweep: SweepDir) -> list[RunDir]:
    try:
        return sweep.rundirs()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RunnerError):  # damaged
        return []
