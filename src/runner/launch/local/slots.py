"""Divide the GPUs and CPU cores of this machine among concurrent runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from runner.tracking import machine


@dataclass(frozen=True)
class Slot:
    """Resources of one run."""

    threads: int
    gpus: tuple[str, ...] = ()
    """Values for CUDA_VISIBLE_DEVICES; empty: do not set the variable."""

    def enter(self) -> None:
        """Show this process its GPUs only. Call it before CUDA is initialized.

        The numbers are NVML's, which counts in the order of the PCI bus; CUDA would count the fastest GPU first.
        """
        if self.gpus:
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)


def share(parallel: int | None, *, threads: int | None, processes: int = 1) -> list[Slot]:
    """One slot per concurrent run: a GPU for each of its ``processes`` (idle GPUs first), and CPU threads.

    Args:
        parallel: number of concurrent runs; None: as many as the idle GPUs suffice for, or 1 without GPUs.
        threads: CPU threads of each process; None: the cores divided by all processes.
    """
    gpus, idle = machine.visible_gpus(), machine.idle_gpus()
    count = parallel or max(1, len(idle) // processes)
    threads = threads or max(1, cores() // (count * processes))
    ordered = [*idle, *(gpu for gpu in gpus if gpu not in idle)]
    return [Slot(threads, tuple(ordered[n * processes : (n + 1) * processes])) for n in range(count)]


def cores() -> int:
    """OMP_NUM_THREADS if it is set, else the number of CPU cores that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return own_threads() or available


def own_threads() -> int:
    """The number in OMP_NUM_THREADS; 0 if it is not set, or not a number of threads."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() else 0
