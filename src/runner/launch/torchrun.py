"""One run in processes that torchrun or ``accelerate launch`` has started, each with the same command line.

Rank 0 composes, checks and prepares the run, then broadcasts its folder; all ranks train it. Only rank 0 prints, and
its exit code is the result: torchrun stops the other ranks as soon as one ends with a code other than 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.errors import ConfigError, Fault, LaunchError, refuse
from runner.launch.launcher import Source
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir
from runner.train.distributed.ranks import Ranks, of_environment, silent

ACCELERATE = "ACCELERATE_MIXED_PRECISION"
"""A variable that ``accelerate launch`` always sets."""
DTYPE = "accelerate launch starts processes only; choose the dtype with model.dtype=bfloat16"
SHARDS = "accelerate launch starts processes only; write parallel=fsdp"
SETTINGS = {
    ACCELERATE: ("--mixed_precision", "no", DTYPE),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "no", "leave it out; write compile=regional or compile=default"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "--gradient_accumulation_steps", "1", "leave it out; write train.gradient_accumulation_steps=…",
    ),
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "false", SHARDS),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "false", f"{SHARDS}: it shards as ZeRO-3 does"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "false", SHARDS),
}  # fmt: skip
"""Variable that ``accelerate launch`` sets → (its flag, the value without an effect, what to write here)."""


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
            ConfigError: a ``launcher`` override, a sweep, or a setting of ``accelerate launch``.
        """
        refuse(ignored_settings())
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
        ConfigError: a setting of ``accelerate launch`` that has no effect here.
        LaunchError: several processes were requested, one was started.
    """
    refuse(ignored_settings())
    requested = _processes_of_accelerate() if ACCELERATE in os.environ else 1
    if requested > 1 and of_environment().world == 1:
        problem = f"accelerate launch found no GPU and started 1 process instead of {requested}"
        remedy = f"set launcher=accelerate launcher.processes={requested}, or use torchrun --nproc-per-node {requested}"
        raise LaunchError(Fault("--num-processes", problem, remedy, requested))


def ignored_settings() -> Iterator[Fault]:
    """Faults of settings of ``accelerate launch``, or of its configuration file, that have no effect here."""
    for variable, (flag, default, remedy) in SETTINGS.items() if ACCELERATE in os.environ else ():
        value = os.environ.get(variable, default)
        if value.lower() != default:
            yield Fault(
                flag, "has no effect here", f"{remedy} (and {flag} {default}, if accelerate config set it)", value
            )


def refuse_srun() -> None:
    """Refuse to train in one of several tasks that ``srun`` has started: each would train a run of its own.

    Raises:
        LaunchError: in the first task; the others end with the same exit code.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdecimal() or int(tasks) < 2 or "RANK" in os.environ:
        return
    problem = f"srun has started {tasks} tasks, and each would train a run of its own"
    remedy = (
        f"launcher=slurm launcher.tasks_per_node={tasks} submits one run of {tasks} processes; in an allocation: "
        f"srun --ntasks=1 python -m runner launcher=accelerate launcher.processes={tasks} …"
    )
    error = LaunchError(Fault("srun --ntasks", problem, remedy, int(tasks)))
    if os.environ.get("SLURM_PROCID", "0") != "0":
        sys.exit(error.exit_code)
    raise error


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
