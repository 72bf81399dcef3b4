"""What runs that are at work at the same time may each use of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from runner.tracking import machine


@dataclass(frozen=True)
class Slot:
    """The part of one run."""

    threads: int
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; empty leaves that as it is."""


def share(parallel: int | None, *, threads: int | None, processes: int = 1) -> list[Slot]:
    """What each of the runs at the same time may use: a GPU for each process, idle ones first, and cores.

    Args:
        parallel: how many runs; None: as many as there are idle GPUs for, and one on the CPU.
        threads: of each of a run's ``processes``; None: the cores divided by all of them.
    """
    gpus, idle = machine.visible_gpus(), machine.idle_gpus()
    several = parallel or max(1, len(idle) // processes)
    each = threads or max(1, cores() // (several * processes))
    ordered = [*idle, *(gpu for gpu in gpus if gpu not in idle)]
    return [Slot(each, tuple(ordered[n * processes : (n + 1) * processes])) for n in range(several)]


def cores() -> int:
    """Those that this process may use; OMP_NUM_THREADS, where it is set, says how many of them it should."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() and int(named) else len(os.sched_getaffinity(0))
