"""Several processes of one run on this machine, brought up and watched by torch elastic."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runner.config.schema import Count
from runner.errors import Fault, Interrupted, LaunchError, Preempted, Stopped
from runner.launch.launcher import Source
from runner.launch.local import launcher
from runner.launch.local.slots import Slot, share
from runner.signals import SIGNALS
from runner.tracking import machine
from runner.tracking.rundir import RunDir, State
from runner.tracking.sweepdir import SweepDir
from runner.train import outcome
from runner.train.distributed.ranks import ProcessGroup

LONGEST_END_S = 600
"""How long a rank that was told to stop may take to save, and to wait for MLflow: torch elastic then kills it."""
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


@dataclass(frozen=True)
class Elastic:
    """``processes`` ranks of each run on this machine; of a sweep as many runs at once as there are GPUs for."""

    processes: int
    is_detached: bool = False

    def check(self, at_once: int | None = None) -> None:
        gpus = len(machine.visible_gpus())
        if 0 < gpus < self.processes * (at_once or 1) and gpus >= self.processes:
            problem = f"{at_once} runs of {self.processes} processes want more than the {gpus} GPUs there are"
            raise LaunchError(Fault("search.at_once", problem, f"set it to {gpus // self.processes} or less", at_once))
        if 0 < gpus < self.processes:
            remedy = f"set it to {gpus} or less: each process computes on a GPU of its own"
            raise LaunchError(Fault("launcher.processes", f"there are {gpus} GPUs", remedy, self.processes))

    def plan(self, runs: int) -> str:
        several = min(runs, len(self._slots(None)))
        at_once = f"; {several} of {runs} runs at once" if runs > 1 else ""
        return f"{self.processes} processes on this machine, of {_threads(self.processes)} threads each{at_once}"

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        if sweep is None and len(rundirs) == 1:
            return [run(rundirs[0], self.processes)]
        return launcher.work_through(rundirs, self._slots(None), partial(run, processes=self.processes), sweep)

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        return launcher.serve(source, self._slots(at_once), partial(run, processes=self.processes), sweep)

    def _slots(self, at_once: int | None) -> list[Slot]:
        return share(at_once, threads=None, processes=self.processes)


def accelerate(*, processes: Count) -> Elastic:
    """Several processes on this machine, as ``accelerate launch`` and ``torchrun`` start them."""
    return Elastic(processes)


def run(rundir: RunDir, processes: int, mirrored: bool = False) -> int:
    """Work on one run with several ranks to its end; returns the exit code (0, 1, 2, 75 or 130).

    Each rank is forked from this process after the libraries are imported. Where there are GPUs it starts afresh:
    torch elastic asks for them, which touches CUDA, and that cannot be used after a fork then.
    """
    fork = not machine.visible_gpus()
    if fork:
        launcher.load_libraries(with_adapters=True)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    before = rundir.read_state()
    with _passing_on_signals(processes) as asked, tempfile.TemporaryDirectory(prefix="runner-") as folder:
        newer: dict[str, Any] = {"signals_to_handle": "", "shutdown_timeout": LONGEST_END_S}
        config = LaunchConfig(
            **{name: value for name, value in newer.items() if name in LaunchConfig.__dataclass_fields__},
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork" if fork else "spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            codes = elastic_launch(config, _rank)(str(rundir.path), processes, mirrored)
            return int(codes[0])
        except ChildFailedError as error:
            leading = error.failures.get(0)
            if leading is not None and leading.exitcode > 0:  # rank 0 ended by itself and has written down how
                return int(leading.exitcode)
            return _what_it_came_to(rundir, before, asked)
        except SignalException:  # a torch that handles signals itself
            return _what_it_came_to(rundir, before, asked)


def _rank(path: str, processes: int, mirrored: bool) -> int:
    """What a process does that was started for one rank; its exit code, unless that is 0."""
    os.setpgrp()  # Ctrl-C at the terminal reaches the launcher alone, which passes it on
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    import torch

    from runner.train import worker

    torch.set_num_threads(_threads(processes))
    code = worker.work(RunDir(Path(path)), mirrored=mirrored)
    if code:  # torch elastic waits for all ranks where one returns, and stops the others where one ends
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _what_it_came_to(rundir: RunDir, before: State, asked: list[int]) -> int:
    """The exit code of a run whose ranks did not all complete it, and its state where no rank could write it down."""
    state = rundir.read_state()
    said_nothing = state.updated == before.updated or state.status in ("pending", "running")
    if said_nothing and not rundir.is_alive():
        clock = outcome.Clock(state.seconds)
        if asked:
            return outcome.stopped(rundir, clock, _stopped_by(asked[-1]))
        return outcome.left_by_peer(rundir, clock, ProcessGroup(0, 2, 0, 2), wait_s=0.0)
    if state.status == "killed" and not asked:
        return 1
    return outcome.exit_code(state)


def _stopped_by(number: int) -> Stopped:
    if number == signal.SIGINT:
        return Interrupted("interrupted")
    return Preempted(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def _passing_on_signals(processes: int) -> Iterator[list[int]]:
    """While the block runs, signals are for the ranks, each once; yields those that came.

    Ranks begin with the signals blocked, until they can tell what to do with one. So this thread blocks them too, and
    another one takes them, and passes them on when all ranks are there.
    """
    asked: list[int] = []
    done = threading.Event()

    def pass_on() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        passed = 0
        while not done.wait(0.05):
            children = multiprocessing.active_children()
            while len(asked) > passed and (passed or len(children) == processes):
                for pid in (child.pid for child in children if child.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, asked[passed])
                passed += 1

    before = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in SIGNALS}
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _threads(processes: int) -> int:
    """Of each process: the cores divided among them, unless OMP_NUM_THREADS says how many."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdigit() else max(1, cores // processes)


def _quiet() -> None:
    """What torch elastic has to say of a rank that ended is in the run's state and in the rank's log."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        chatty = logging.getLogger(name)
        chatty.addHandler(logging.NullHandler())
        chatty.propagate = False
