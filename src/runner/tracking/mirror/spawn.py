"""The mirror of a sweep as its submitter sees it: a process to start, to wait for, and to ask how far it got.

Only this process loads MLflow; the submitter imports nothing heavy for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.bind import bind
from runner.errors import RunnerError
from runner.tracking import manifest
from runner.tracking.metrics_log import read
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

Mirror = subprocess.Popen[bytes]


@dataclass(frozen=True)
class SweepResult:
    """How far MLflow got with a sweep."""

    untold: int
    """Runs that ended and are not in MLflow to their end."""
    message: str
    """How to look at the sweep, or why MLflow has not got it all; ``python -m runner sync`` brings the rest."""


@contextlib.contextmanager
def queueing(sweep: SweepDir) -> Iterator[None]:
    """Say, while the block runs, that a queue of this machine works through the sweep; several may at once."""
    with sweep.queue_lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def mirrored(sweep: SweepDir) -> Iterator[Callable[[], None]]:
    """While the block works through the sweep here, one process brings all its runs into MLflow; it ends soon after.

    Yields what waits until the ids of parent and children are fixed: to be called before the first job starts.
    """
    with queueing(sweep):
        mirror = start_sweep_mirror(sweep)
        yield lambda: _tell(wait_opened(mirror, sweep))
    result = wait_sweep_mirror(mirror, sweep)
    if result.untold:
        print(f"MLflow has not got {result.untold} runs to their end ({result.message})", file=sys.stderr)
        print(f"bring them: python -m runner sync {sweep.path}", file=sys.stderr)


def start_sweep_mirror(sweep: SweepDir) -> Mirror | None:
    """Start the process that makes the sweep's runs in MLflow and then mirrors them; None if all are offline.

    Whoever starts it is ``queueing`` already, or it finds no queue and ends. It runs in a session
    of its own: neither Ctrl-C nor the end of this process takes it along.
    """
    return _start(sweep, "--sweep")


def open_in_mlflow(sweep: SweepDir, timeout_s: float = 600.0) -> str:
    """Make the sweep's runs in MLflow where each job mirrors itself (launcher=slurm), and wait for it.

    Returns:
        why MLflow has not got them, which is also said; empty when it has, or when all are offline. Jobs may start
        either way.
    """
    problem = wait_opened(_start(sweep, "--open"), sweep, timeout_s)
    _tell(problem)
    return problem


def wait_opened(mirror: Mirror | None, sweep: SweepDir, timeout_s: float = 600.0) -> str:
    """Wait until the ids of parent and children are fixed; returns why they are not, empty when they are."""
    give_up_at = time.monotonic() + timeout_s
    while mirror:
        code = mirror.poll()
        if (said := _report(sweep)).get("pid") == mirror.pid:
            return str(said["problem"])
        if code is not None:
            return f"the mirror ended with code {code}, see {sweep.mirror_log}"
        if time.monotonic() > give_up_at:
            return f"process {mirror.pid} is still making its runs in MLflow, see {sweep.mirror_log}"
        time.sleep(0.05)
    return ""


def wait_sweep_mirror(mirror: Mirror | None, sweep: SweepDir, timeout_s: float = 60.0) -> SweepResult:
    """Wait until the mirror has told MLflow all of the sweep; whoever calls this is ``queueing`` no more.

    Where another queue still works on the same sweep it goes on for that one, and this returns after ``timeout_s``.
    """
    if mirror is None:
        return SweepResult(0, "tracking=offline")
    try:
        code: int | None = mirror.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    noted, said = sweep.read().get("mlflow") or {}, _report(sweep)
    if code == 0:
        return SweepResult(0, noted.get("url") or (f"mlflow ui --backend-store-uri {noted['uri']}" if noted else ""))
    untold = int(said.get("untold", 0))
    if code is None:
        return SweepResult(untold, f"process {mirror.pid} is still telling MLflow, see {sweep.mirror_log}")
    problem = said.get("problem") or f"the mirror ended with code {code}, see {sweep.mirror_log}"
    return SweepResult(untold, problem)


def _tell(problem: str) -> None:
    if problem:
        print(f"MLflow: {problem}; the runs go on, and `runner sync` brings them later", file=sys.stderr)


def _start(sweep: SweepDir, how: str) -> Mirror | None:
    if not any(_is_mirrored(rundir) for rundir in sweep.rundirs()):
        return None
    command = [sys.executable, "-P", "-m", "runner.mirror", how, str(sweep.path)]
    return mirror_process(command, sweep.mirror_log)


def _is_mirrored(rundir: RunDir) -> bool:
    try:
        return not str(manifest.read_config(rundir)["tracking"]["_target_"]).endswith(".offline")
    except (RunnerError, KeyError, TypeError):
        return False


def _report(sweep: SweepDir) -> dict[str, Any]:
    try:
        return dict(json.loads(sweep.mirror_report.read_text()))
    except (OSError, ValueError):
        return {}


def start_mirror(rundir: RunDir, cfg: Mapping[str, Any]) -> subprocess.Popen[bytes] | None:
    """Start the process that mirrors ``rundir`` into MLflow; None with ``tracking=offline``.

    It runs in a session of its own, so that neither Ctrl-C nor the end of this process takes it along, and knows by
    the time stamp it is given which state of the run is old.
    """
    if bind(cfg["tracking"], "tracking")().kind == "offline":
        return None
    command = [sys.executable, "-P", "-m", "runner.mirror", str(rundir.path), str(rundir.read_state().updated)]
    return mirror_process(command, rundir.mirror_log)


def mirror_process(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that mirrors, by itself: it outlives this one, and Ctrl-C does not reach it."""
    # One thread is plenty for what waits; and no telemetry, whatever the shell says.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **quiet},
        )


@dataclass(frozen=True)
class MirrorResult:
    """How far MLflow got."""

    url: str | None
    """The page of the run, on a server."""
    unsent: int
    """Records that MLflow does not have."""
    message: str
    """How to look at the run, or why MLflow has not got it all; ``python -m runner sync`` brings the rest."""


def wait_mirror(proc: subprocess.Popen[bytes] | None, rundir: RunDir, timeout_s: float = 60.0) -> MirrorResult:
    """Wait until the mirror has told MLflow all of it, has given up, or has taken too long."""
    if proc is None:
        return MirrorResult(None, len(read(rundir)), "tracking=offline")
    try:
        code: int | None = proc.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    noted, said = rundir.read_manifest().get("mlflow") or {}, read_report(rundir)
    url = noted.get("url")
    # A mirror that was killed has sent more than it last wrote down: better to say too many than too few.
    unsent = 0 if code == 0 else max(0, len(read(rundir)) - int(said.get("sent", 0)))
    if code == 0:
        return MirrorResult(url, unsent, url or (f"mlflow ui --backend-store-uri {noted['uri']}" if noted else ""))
    if code is None:
        return MirrorResult(url, unsent, f"process {proc.pid} is still telling MLflow, see {rundir.mirror_log}")
    problem = said.get("problem") or f"the mirror ended with code {code}, see {rundir.mirror_log}"
    return MirrorResult(url, unsent, problem)


def read_report(rundir: RunDir) -> dict[str, Any]:
    """What the mirror last wrote of itself: {sent, unsent, problem}; empty before it wrote anything."""
    return dict(json.loads(rundir.mirror_report.read_text())) if rundir.mirror_report.exists() else {}
