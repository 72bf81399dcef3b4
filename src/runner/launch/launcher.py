"""What every launcher is: it brings prepared run folders to life. How a worker comes to life is all they differ in."""

from __future__ import annotations

from typing import Protocol

from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


class Source(Protocol):
    """Proposes runs one after the other, and learns how each ended."""

    @property
    def total(self) -> int:
        """How many runs it will propose; one that it proposes again counts once."""

    def next(self) -> RunDir | None:
        """A further run to start now; None where there is none, or none yet."""

    def ended(self, rundir: RunDir) -> None:
        """The run's folder says how it ended."""

    def look(self) -> None:
        """Called again and again while runs go on."""


class Launcher(Protocol):
    """What an option of the group ``launcher`` returns; picklable, and made without importing torch."""

    @property
    def processes(self) -> int:
        """Ranks of one run: the world size that its batches are divided over."""

    @property
    def is_detached(self) -> bool:
        """Whether ``launch`` returns before the runs have ended."""

    def check(self, at_once: int | None = None) -> None:
        """Refuse what this machine or the scheduler cannot give; called once, before anything is written.

        Args:
            at_once: how many runs a search wants to have at work.

        Raises:
            LaunchError: with the scheduler's own reason.
        """

    def plan(self, runs: int) -> str:
        """What would be started for a run, or a sweep of so many: for Slurm the very script."""

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        """Start the workers of these runs.

        Returns:
            an exit code for each, also 0 where it was only submitted; fewer where a stop came first. Of several runs
            75 and 130 say that all of them were stopped, not one alone.
        """

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        """Bring to their ends the runs that ``source`` proposes, ``at_once`` of them at the same time.

        Returns:
            the exit code: 0 where nothing more is proposed, 75 or 130 after a stop.
        """
