"""The folder of a sweep: the only place that names its files. It holds sweep.json and, one folder each, its runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files import is_held, locked, write_atomic
from runner.tracking.rundir import RunDir


@dataclass(frozen=True)
class SweepDir:
    """Every path of one sweep hangs off this object; its runs are RunDirs in folders below it."""

    path: Path

    @property
    def manifest(self) -> Path:
        """{id, name, created, commands, mlflow: {parent_run_id, …}, jobs: {signature: {folder, label}}}"""
        return self.path / "sweep.json"

    @property
    def lock(self) -> Path:
        """Held for an instant by whoever reads and changes sweep.json."""
        return self.path / ".sweep.lock"

    @property
    def queue_lock(self) -> Path:
        """Held by each process that works through this sweep here (shared: two may)."""
        return self.path / ".queue.lock"

    @property
    def cancel_request(self) -> Path:
        """Lies here once somebody has cancelled the search, until it is taken up again: nothing more is proposed."""
        return self.path / ".cancel"

    @property
    def search_lock(self) -> Path:
        """Held by the process that proposes the runs of this sweep: a second one would propose against it."""
        return self.path / ".search.lock"

    @property
    def search_journal(self) -> Path:
        """What Optuna has proposed and was told, line by line."""
        return self.path / "search.journal"

    @property
    def mlflow_lock(self) -> Path:
        """Held by whoever makes the sweep's runs in MLflow, or brings their parent up to date."""
        return self.path / ".mlflow.lock"

    @property
    def mirror_lock(self) -> Path:
        """Held by the process that mirrors all runs of this sweep: a second one waits until the first is done."""
        return self.path / ".mirror.lock"

    @property
    def mirror_log(self) -> Path:
        return self.path / "mirror.log"

    @property
    def mirror_report(self) -> Path:
        """How far that process got: {pid, opened, untold, problem}."""
        return self.path / "mirror.json"

    def is_worked_on(self) -> bool:
        """Whether a queue works through this sweep here, or a worker that it forked does, even after it was killed."""
        return is_held(self.queue_lock, shared=True)

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self.manifest.read_text())) if self.manifest.exists() else {}

    def update(self, **changes: Any) -> dict[str, Any]:
        """Change sweep.json under its lock; returns what stands there then."""
        with locked(self.lock):
            manifest = {**self.read(), **changes}
            write_atomic(self.manifest, json.dumps(manifest, indent=1, default=str))
        return manifest

    def rundirs(self) -> list[RunDir]:
        """The runs of the sweep, in the order in which they were asked for."""
        return [RunDir(self.path / job["folder"]) for job in self.read().get("jobs", {}).values()]


def slurm_room(home: Path) -> Path:
    """The folder of all that submitit and Slurm write of a sweep, or of a run alone: submissions, scripts, output."""
    return home / "slurm"


def home_of(rundir: RunDir) -> Path:
    """Where a run is submitted from: the folder of its sweep, or its own."""
    sweep = sweep_of(rundir)
    return sweep.path if sweep else rundir.path


def sweep_of(rundir: RunDir) -> SweepDir | None:
    """The sweep that a run belongs to."""
    folder = rundir.path.parent
    return SweepDir(folder) if (folder / "sweep.json").exists() else None
