"""Processes that somebody else started, each with the same command line: torchrun, or ``accelerate launch``.

Rank 0 composes, refuses or prepares; then it tells the others the folder, and all of them work on it. Only rank 0
speaks, and the exit code is its own: whoever started them stops the others as soon as one ends with another than 0.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.errors import ConfigError, Fault, LaunchError
from runner.launch.launcher import Source
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir
from runner.train.distributed.ranks import Ranks, of_environment, silent


@dataclass
class Joined:
    """The launcher of such processes: they are there already."""

    processes: int
    is_detached: bool = False
    has_launched: bool = False

    def check(self, at_once: int | None = None) -> None:
        pass

    def plan(self, runs: int) -> str:
        assert runs == 1, "a sweep is refused before"
        return f"the {self.processes} processes that were started"

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:  # noqa: ARG002
        raise AssertionError("a sweep is refused before")

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        assert sweep is None, "a sweep is refused before"
        assert len(rundirs) == 1
        self.has_launched = True
        ranks = of_environment()
        ranks.join()
        ranks.broadcast(str(rundirs[0].path))
        return [_work(rundirs[0])]

    def refuse(self, overrides: list[str], *, is_sweep: bool) -> None:
        """Refuse what such processes cannot do.

        Raises:
            ConfigError: a launcher of ours, or a sweep.
        """
        for override in overrides:
            key, _, value = override.partition("=")
            if key.partition(".")[0] == "launcher":
                problem = f"{self.processes} processes were started already (torchrun, accelerate launch)"
                raise ConfigError(Fault(key, problem, "leave it out, or leave starting them to runner", value))
        if is_sweep:
            problem = "a sweep starts the processes of each run itself"
            remedy = f"python -m runner -m launcher=accelerate launcher.processes={self.processes} …"
            raise ConfigError(Fault("-m", problem, remedy))


def among_several(command: Callable[[Joined], int]) -> int:
    """Do ``command`` on rank 0 and what follows from it on the others; returns the exit code of this process."""
    ranks = of_environment()
    if ranks.rank:
        with silent(os.devnull):
            return _follow(ranks)
    launcher = Joined(ranks.world)
    try:
        return command(launcher)
    finally:
        if not launcher.has_launched:
            ranks.join()
            ranks.broadcast("")
            ranks.leave()


def refuse_lonely() -> None:
    """Refuse to be the one process that ``accelerate launch`` starts of several where it finds no GPU.

    Raises:
        LaunchError: it was asked for several, and passed that on to nobody.
    """
    wanted = _asked_of_accelerate() if "ACCELERATE_MIXED_PRECISION" in os.environ else 1
    if wanted > 1 and of_environment().world == 1:
        problem = f"accelerate launch was asked for {wanted} processes and started one: it found no GPU"
        remedy = f"launcher=accelerate launcher.processes={wanted}, or torchrun --nproc-per-node {wanted} -m runner"
        raise LaunchError(Fault("--num-processes", problem, remedy, wanted))


def _asked_of_accelerate() -> int:
    """The number on the command line of the process that started this one; 1 where none stands there."""
    import psutil

    with contextlib.suppress(psutil.Error):
        words = " ".join(psutil.Process(os.getppid()).cmdline())
        found = re.search(r"--num[_-]processes[= ](\d+)", words)
        return int(found[1]) if found else 1
    return 1


def _follow(ranks: Ranks) -> int:
    ranks.join()
    folder = ranks.broadcast("")
    if folder:
        return _work(RunDir(Path(folder)))
    ranks.leave()
    return 0


def _work(rundir: RunDir) -> int:
    from runner.train import worker

    return worker.work(rundir)
