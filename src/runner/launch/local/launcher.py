"""``launcher=local``: a single run in this process; the runs of a sweep in a queue, one process each."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from runner import imports, log_handlers, terminal
from runner.config.schema import Processes
from runner.errors import Fault, LaunchError
from runner.launch.launcher import Source
from runner.launch.local import queue
from runner.launch.local.slots import Slot, share
from runner.models.kernels import compat
from runner.tracking import machine
from runner.tracking.mirror import spawn
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

LIBRARIES = (
    "accelerate", "rich.console", "rich.table", "torch._dynamo", "torch._inductor.compile_fx",
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "runner.models.pretrained", "runner.train.build", "runner.train.text_generation", "runner.train.loop",
    "runner.train.teacher_cache", "runner.train.worker",
)  # fmt: skip
"""What every run imports."""
OF_ADAPTERS = "peft", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion"


class Start(Protocol):
    """Trains one run in a process of the queue; returns its exit code."""

    def __call__(self, rundir: RunDir, *, mirrored: bool) -> int: ...


@dataclass(frozen=True)
class Local:
    """Launcher for runs of one process each; see launch/launcher.py."""

    parallel: int | None
    threads: int | None
    processes: int = 1
    is_detached: bool = False

    def check(self, at_once: int | None = None) -> None:
        gpus, runs = len(machine.visible_gpus()), at_once or self.parallel or 1
        if 0 < gpus < runs:
            problem = f"each run needs its own GPU, and NVML and CUDA_VISIBLE_DEVICES show {gpus}"
            key = "search.at_once" if at_once else "launcher.parallel"
            raise LaunchError(Fault(key, problem, f"set it to {gpus} or less, or to null", runs))

    def plan(self, runs: int) -> str:
        slots = self.slots() if runs > 1 else self.slots()[:1]
        gpus, visible = " | ".join(",".join(slot.gpus) for slot in slots if slot.gpus), len(machine.visible_gpus())
        on = f", GPU {gpus} (of {visible})" if gpus else ""
        at_once = f"{min(runs, len(slots))} of {runs} runs at once, " if runs > 1 else ""
        threads = slots[0].threads
        return f"on this machine: {at_once}{threads} thread{'s' if threads > 1 else ''} each{on}"

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        if sweep is None and len(rundirs) == 1:
            return [self._here(rundirs[0])]
        return work_through(rundirs, self.slots(), work, sweep)

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        return serve(source, self.slots(at_once), work, sweep)

    def slots(self, at_once: int | None = None) -> list[Slot]:
        return share(at_once or self.parallel, threads=self.threads)

    def _here(self, rundir: RunDir) -> int:
        from runner.train import worker

        if self.threads:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # torch reads it when it is imported
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(self.threads)
        if "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized():
            self.slots()[0].enter()  # of several GPUs: an idle one
        return worker.work(rundir)


def local(*, parallel: Processes | None, threads: Processes | None) -> Local:
    """Train on this machine, several runs of a sweep at once where there is more than one GPU."""
    return Local(parallel, threads)


def serve(source: Source, slots: list[Slot], start: Start, sweep: SweepDir) -> int:
    """Train the runs that ``source`` proposes, in a queue; returns the exit code."""
    first = source.next()  # created before the sweep's mirror process starts
    codes = work_through([first], slots, start, sweep, source) if first else []
    return next((code for code in (130, 75) if code in codes), 0)


def work_through(
    rundirs: list[RunDir], slots: list[Slot], start: Start, sweep: SweepDir | None, source: Source | None = None
) -> list[int]:
    """Train the runs in a queue of this machine. One mirror process uploads all runs of a sweep to MLflow."""
    if sweep is None:
        return queue.work_through(rundirs, slots, partial(start, mirrored=False), None, lambda: warm(slots[0]))
    codes: list[int] = []
    with spawn.mirrored(sweep, codes) as opened:

        def prepare() -> None:
            warm(slots[0])  # takes seconds, in which the mirror creates the parent run
            opened()

        codes += queue.work_through(rundirs, slots, partial(start, mirrored=True), sweep, prepare, source)
    return codes


def work(rundir: RunDir, mirrored: bool) -> int:
    """Train one run of one process; the ``start`` function of the queue."""
    from runner.train import worker

    return worker.work(rundir, mirrored=mirrored)


def warm(slot: Slot) -> None:
    """Import the libraries that every run needs, without starting threads and without initializing CUDA."""
    os.environ["OMP_NUM_THREADS"] = str(slot.threads)
    terminal.loading("torch and transformers, once for all runs")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() queries NVML instead of initializing CUDA
    # peft imports bitsandbytes, which queries the GPU: with GPUs each child imports it (0.5 s)
    load_libraries(with_adapters=not slot.gpus)


def load_libraries(with_adapters: bool) -> None:
    """Import the libraries that every run needs before processes are forked from this one."""
    log_handlers.quiet_libraries()
    with imports.uncollected(), compat.without_compile_workers():
        for name in LIBRARIES:
            importlib.import_module(name)
        for name in OF_ADAPTERS if with_adapters else ():
            with contextlib.suppress(ImportError):  # without bitsandbytes; an older PEFT
                importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # transformers 5: compiles a thousand expressions
        from transformers import conversion_mapping

        conversion_mapping.get_checkpoint_conversion_mapping("llama")
