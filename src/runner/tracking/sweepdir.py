"""Paths of a sweep folder, which contains sweep.json and one folder per run. No other module names its files."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import DamagedError, Fault, LaunchError, ResumeError, RunnerError
from runner.files import is_held, locked, read_kept, restore_lost, write_kept
from runner.tracking import sweep_manifest
from runner.tracking.rundir import RunDir

REMEDY = "restore it; each of its runs can still be used by the path of its folder"
log = logging.getLogger("runner")
PATTERNS = {"%": "'%'", "\\": "'\\'", "\n": "a line break", "\r": "a line break"}
"""Characters that Slurm and submitit do not take literally in the path of a log file, and their names."""


@dataclass(frozen=True)
class SweepDir:
    """A sweep folder: its paths, sweep.json and its runs."""

    path: Path

    @property
    def manifest(self) -> Path:
        """{id, name, created, commands, mlflow: {parent_run_id, …}, jobs: {signature: {folder, label}}}

        If it was rebuilt from its runs, ``is_rebuilt``: ``id`` is not that of the parent run in MLflow.
        """
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
        """Contents of sweep.json; if it is damaged, restored from its copy or from its runs; empty if there is none.

        Args:
            is_locked: the caller holds the lock.

        Raises:
            DamagedError: the file and its copy are damaged, and no run of the sweep can be read.
        """
        try:
            return read_kept(self.manifest, REMEDY, None if is_locked else self.lock)
        except FileNotFoundError:
            return {}
        except DamagedError as error:
            if os.access(self.manifest, os.R_OK) and (content := self._rebuilt(error.faults[0].problem, is_locked)):
                return content
            raise

    def restore(self) -> None:
        """Write a lost sweep.json again, from its copy or from its runs, with a warning."""
        restore_lost(self.manifest, self.lock)
        if not self.manifest.exists():
            self._rebuilt(f"{self.manifest} is lost", is_locked=False)

    def _rebuilt(self, problem: str, is_locked: bool) -> dict[str, Any]:
        """Write sweep.json again from the manifests of its runs; returns its contents, empty if they do not tell."""
        if not (content := sweep_manifest.of_runs(self.path)):
            return {}
        with contextlib.suppress(OSError), contextlib.nullcontext() if is_locked else locked(self.lock):
            with contextlib.suppress(DamagedError, FileNotFoundError):  # else another process has just written it
                return read_kept(self.manifest, REMEDY)
            write_kept(self.manifest, content)
        log.warning(f"{problem}; rebuilt from the manifests of its {len(content['jobs'])} runs")
        return content

    def update(self, **changes: Any) -> dict[str, Any]:
        """Change keys of sweep.json under its lock; returns the new contents."""
        with locked(self.lock):
            manifest = {**self.read(is_locked=True), **changes}
            write_kept(self.manifest, manifest)
        return manifest

    def command(self) -> str:
        """The last command of this sweep, to be copied into a shell; empty if it is not recorded or not readable."""
        with contextlib.suppress(DamagedError, OSError):
            command = (self.read().get("commands") or [[]])[-1]
            return command if isinstance(command, str) else shlex.join(command)
        return ""

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
