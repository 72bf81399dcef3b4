"""One run in processes that torchrun or ``accelerate launch`` has started, each with the same command line.

Rank 0 composes, checks and prepares the run, then broadcasts its folder; all ranks train it. Only rank 0 prints, and
its exit code is the result: torchrun stops the other ranks as soon as one ends with a code other than 0.
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
    """A launcher that starts nothing: the processes exist already."""

    processes: int
    is_detached: bool = False
    has_launched: bool = False

    def check(self, at_once: int | None = None) -> None:
        pass

    def plan(self, runs: int) -> str:
        assert runs == 1, "sweeps are refused in refuse()"
        return f"the {self.processes} processes that were started"

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:  # noqa: ARG002
        raise AssertionError("sweeps are refused in refuse()")

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        assert sweep is None, "sweeps are refused in refuse()"
        assert len(rundirs) == 1
        self.has_launched = True
        ranks = of_environment()
        ranks.join()
        ranks.broadcast(str(rundirs[0].path))
        return [_work(rundirs[0])]

    def refuse(self, overrides: list[str], *, is_sweep: bool) -> None:
        """Refuse what does not work under torchrun.

        Raises:
            ConfigError: a ``launcher`` override, or a sweep.
        """
        for override in overrides:
            key, _, value = override.partition("=")
            if key.partition(".")[0] == "launcher":
                problem = f"torchrun or accelerate launch has started {self.processes} processes already"
                raise ConfigError(Fault(key, problem, "remove it, or run python -m runner without torchrun", value))
        if is_sweep:
            problem = "a sweep cannot run under torchrun or accelerate launch: it starts the processes of each run"
            remedy = f"python -m runner -m launcher=accelerate launcher.processes={self.processes} …"
            raise ConfigError(Fault("-m", problem, remedy))


def among_several(command: Callable[[Joined], int]) -> int:
    """Call ``command`` on rank 0; the other ranks wait for the run folder and train. Returns this rank's exit code."""
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
    """Refuse to train in one process where ``accelerate launch`` was called with several.

    Without a GPU, accelerate starts a single process and sets no variable that contains the requested number.

    Raises:
        LaunchError: several processes were requested, one was started.
    """
    requested = _processes_of_accelerate() if "ACCELERATE_MIXED_PRECISION" in os.environ else 1
    if requested > 1 and of_environment().world == 1:
        problem = f"accelerate launch found no GPU and started 1 process instead of {requested}"
        remedy = f"set launcher=accelerate launcher.processes={requested}, or use torchrun --nproc-per-node {requested}"
        raise LaunchError(Fault("--num-processes", problem, remedy, requested))


def _processes_of_accelerate() -> int:
    """``--num_processes`` on the command line of the parent process; 1 if it is not set."""
    import psutil

    with contextlib.suppress(psutil.Error):
        command = " ".join(psutil.Process(os.getppid()).cmdline())
        if match := re.search(r"--num[_-]processes[= ](\d+)", command):
            return int(match[1])
    return 1


def _follow(ranks: Ranks) -> int:
    """Rank > 0: receive the run folder from rank 0 and train; an empty folder means that rank 0 has no run."""
    ranks.join()
    folder = ranks.broadcast("")
    if folder:
        return _work(RunDir(Path(folder)))
    ranks.leave()
    return 0


def _work(rundir: RunDir) -> int:
    from runner.train import worker

    return worker.work(rundir)
