"""``launcher=accelerate``: several processes per run on this machine, started and monitored by torch elastic."""

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

from runner.config.schema import Processes
from runner.errors import Fault, Interrupted, LaunchError, Preempted, Stopped
from runner.launch.launcher import Source
from runner.launch.local import launcher
from runner.launch.local.slots import Slot, cores, own_threads, share
from runner.signals import SIGNALS, restore_defaults, signals_to
from runner.tracking import machine
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir
from runner.train import outcome
from runner.train.distributed.ranks import ProcessGroup

LONGEST_END_S = 600
"""Seconds that a rank has after a stop to save its state and to upload to MLflow; then torch elastic kills it."""
PR_SET_PDEATHSIG = 1  # Linux prctl: a signal when the parent process ends


@dataclass(frozen=True)
class Elastic:
    """Launcher for runs of ``processes`` ranks each; trains as many runs at once as there are GPUs for."""

    processes: int
    is_detached: bool = False

    def check(self, at_once: int | None = None) -> None:
        gpus = len(machine.visible_gpus())
        if 0 < gpus < self.processes * (at_once or 1) and gpus >= self.processes:
            problem = f"{at_once} runs of {self.processes} processes need more than {gpus} GPUs"
            raise LaunchError(Fault("search.at_once", problem, f"set it to {gpus // self.processes} or less", at_once))
        if 0 < gpus < self.processes:
            problem = f"each process needs its own GPU, and this machine has {gpus}"
            raise LaunchError(Fault("launcher.processes", problem, f"set it to {gpus} or less", self.processes))

    def plan(self, runs: int) -> str:
        at_once = f"; {min(runs, len(self._slots(None)))} of {runs} runs at once" if runs > 1 else ""
        return f"{self.processes} processes on this machine, {_threads(self.processes)} threads each{at_once}"

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        if sweep is None and len(rundirs) == 1:
            return [run(rundirs[0], self.processes)]
        return launcher.work_through(rundirs, self._slots(None), partial(run, processes=self.processes), sweep)

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        return launcher.serve(source, self._slots(at_once), partial(run, processes=self.processes), sweep)

    def _slots(self, at_once: int | None) -> list[Slot]:
        return share(at_once, threads=None, processes=self.processes)


def accelerate(*, processes: Processes) -> Elastic:
    """Several processes on this machine, as ``accelerate launch`` and ``torchrun`` start them."""
    return Elastic(processes)


def run(rundir: RunDir, processes: int, mirrored: bool = False) -> int:
    """Train one run with several ranks; returns the exit code (0, 1, 2, 75 or 130).

    On the CPU, ranks are forked from this process after the libraries are imported. With GPUs they are spawned:
    torch elastic initializes CUDA in this process, and CUDA cannot be used in a fork after that.
    """
    fork = not machine.visible_gpus()
    if fork:
        launcher.load_libraries(with_adapters=True)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    before = rundir.read_state()
    with _forwarding_signals(processes) as signals, tempfile.TemporaryDirectory(prefix="runner-") as folder:
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
            rank_0 = error.failures.get(0)
            if rank_0 is not None and rank_0.exitcode > 0:  # not killed: rank 0 has written the run's state
                return int(rank_0.exitcode)
            return _exit_code(rundir, before, signals)
        except SignalException as error:  # a version of torch that handles signals itself, and tells the ranks
            return _exit_code(rundir, before, signals or [error.sigval])


def _rank(path: str, processes: int, mirrored: bool) -> int:
    """Entry point of one rank. Exits the process with the exit code unless that is 0."""
    os.setpgrp()  # Ctrl-C reaches only the launcher, which forwards it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    restore_defaults()
    import torch

    from runner.train import worker

    torch.set_num_threads(_threads(processes))
    code = worker.work(RunDir(Path(path)), mirrored=mirrored)
    if code:  # elastic waits for all ranks if this one returns, and stops the others if it exits
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _exit_code(rundir: RunDir, before: State, signals: list[int]) -> int:
    """The exit code after a rank has failed or was stopped; also writes the run's state if no rank could write it."""
    state = rundir.read_state()
    is_unwritten = state.updated == before.updated or state.status in ("pending", "running")
    if is_unwritten and not rundir.is_alive():
        clock = outcome.Clock(state.seconds)
        if signals:
            return outcome.stopped(rundir, clock, _stopped_by(signals[-1]))
        return outcome.left_by_peer(rundir, clock, ProcessGroup(0, 2, 0, 2), wait_s=0.0)
    if state.status == "killed" and not signals:
        return 1
    return outcome.exit_code(state)


def _stopped_by(number: int) -> Stopped:
    if number == signal.SIGINT:
        return Interrupted("interrupted")
    return Preempted(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def _forwarding_signals(processes: int) -> Iterator[list[int]]:
    """Forward signals to the ranks, each signal once; yields the list of signals received so far.

    A rank inherits blocked signals and unblocks them when it can handle them. Therefore this thread blocks them, and
    another thread receives them and forwards them when all ranks have started.
    """
    signals: list[int] = []
    done = threading.Event()

    def forward() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        forwarded = 0
        while not done.wait(0.05):
            children = multiprocessing.active_children()
            while len(signals) > forwarded and (forwarded or len(children) == processes):
                for pid in (child.pid for child in children if child.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signals[forwarded])
                forwarded += 1

    thread = threading.Thread(target=forward, daemon=True)
    with signals_to(lambda received, _: signals.append(received)):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        thread.start()
        try:
            yield signals
        finally:
            done.set()
            thread.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _threads(processes: int) -> int:
    """CPU threads of each process: OMP_NUM_THREADS, or the cores divided by the number of processes."""
    return own_threads() or max(1, cores() // processes)


def _quiet() -> None:
    """Silence torch elastic's logs about failed ranks: the run's state and the rank's log contain the failure."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
