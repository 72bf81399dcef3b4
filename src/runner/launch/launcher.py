"""Interfaces: a launcher starts the workers of prepared runs; a source proposes runs to a launcher."""

from __future__ import annotations

from typing import Protocol

from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


class Source(Protocol):
    """Proposes runs one at a time, for example a hyperparameter search."""

    @property
    def total(self) -> int:
        """Number of runs that will be proposed; a run that is proposed twice counts once."""

    def next(self) -> RunDir | None:
        """The next run to start; None if there is none at the moment."""

    def ended(self, rundir: RunDir) -> None:
        """Called when a run has ended; its state.json contains the result."""

    def poll(self) -> None:
        """Called repeatedly while runs are active."""


class Launcher(Protocol):
    """Returned by the options of the config group ``launcher``. Picklable; created without importing torch."""

    @property
    def processes(self) -> int:
        """World size of one run: its batches are divided over these ranks."""

    @property
    def is_detached(self) -> bool:
        """Whether ``launch`` returns before the runs have ended."""

    def check(self, at_once: int | None = None) -> None:
        """Check that this machine or the scheduler has what is requested; called once, before anything is written.

        Args:
            at_once: how many runs a search wants to run at the same time.

        Raises:
            LaunchError: the resources do not exist; contains the scheduler's own reason.
        """

    def plan(self, runs: int) -> str:
        """Describe how ``runs`` runs would be started; for Slurm, the sbatch script."""

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        """Start the workers of these runs.

        Returns:
            one exit code per run, 0 also for a run that was only submitted; fewer codes if the launcher was stopped
            before all runs were started. With several runs, 75 and 130 mean that all of them were stopped.
        """

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        """Run what ``source`` proposes until it proposes nothing more, ``at_once`` runs at the same time.

        Returns:
            the exit code: 0 if the source has no more runs, 75 or 130 after a stop.
        """
