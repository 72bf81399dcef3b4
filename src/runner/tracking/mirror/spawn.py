"""Start the upload process of a run or sweep, wait for it, and read its progress.

Only the upload process imports MLflow, which takes seconds.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import terminal
from runner.errors import RunnerError
from runner.tracking import manifest
from runner.tracking.metrics_log import read
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

Mirror = subprocess.Popen[bytes]
AFTER_A_STOP_S = 2.0
"""How long a stopped run waits for its upload: schedulers kill some seconds after the signal."""


@dataclass(frozen=True)
class SweepResult:
    """Result of the upload of a sweep."""

    incomplete: int
    """Ended runs that are not fully uploaded."""
    message: str
    """How to open the sweep in MLflow, or why the upload is incomplete; ``python -m runner sync`` completes it."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Each tracker of ``tracking.also`` that lacks something → the first reason."""
    webhook: str = ""
    """Why the message to ``tracking.webhook`` was not sent."""


@contextlib.contextmanager
def queueing(sweep: SweepDir) -> Iterator[None]:
    """Hold the shared queue lock of the sweep inside the ``with`` block: a local queue runs the sweep."""
    with sweep.queue_lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def mirrored(sweep: SweepDir, codes: list[int]) -> Iterator[Callable[[], None]]:
    """Run one upload process for the sweep inside the ``with`` block, and wait for its end afterwards.

    The block appends the exit codes of the runs to ``codes``: after a stop (75, 130) the wait is short.
    Yields a function that waits until the parent run exists: call it before the first job starts.
    """
    with queueing(sweep):
        mirror = start_sweep_mirror(sweep)
        yield lambda: _warn(wait_opened(mirror, sweep))
    result = wait_sweep_mirror(mirror, sweep, AFTER_A_STOP_S if {75, 130} & set(codes) else 60.0)
    if result.incomplete:
        print(f"not fully uploaded to MLflow: {result.incomplete} runs ({result.message})", file=sys.stderr)
        print(f"to upload them: python -m runner sync {terminal.typed(sweep.path)}", file=sys.stderr)
    for line in lacking(result, sweep.path):
        print(line, file=sys.stderr)


def lacking(result: MirrorResult | SweepResult, folder: Path) -> list[str]:
    """A line for each tracker that does not have everything of a run or sweep, and for a message that was not sent."""
    problems = {name: problem for name, problem in result.also.items() if problem}
    later = f"send it later: python -m runner sync {terminal.typed(folder)}"
    lines = [f"not fully sent to {name}: {problem}; {later}" for name, problem in problems.items()]
    return [*lines, *([f"webhook  {result.webhook}"] if result.webhook else [])]


def start_sweep_mirror(sweep: SweepDir) -> Mirror | None:
    """Start the process that creates the sweep's parent run in MLflow and uploads its runs; None if all are offline.

    Call it inside ``queueing``: without a queue the process ends at once. It has its own session: neither Ctrl-C nor
    the end of this process stops it.
    """
    return _start(sweep, "--sweep")


def open_in_mlflow(sweep: SweepDir, timeout_s: float = 600.0) -> str:
    """Create the sweep's parent run in MLflow and wait until it exists; each job uploads itself later (launcher=slurm).

    Returns:
        the error message, also printed; empty on success, or if all runs are offline. Jobs may start in any case.
    """
    problem = wait_opened(_start(sweep, "--open"), sweep, timeout_s)
    _warn(problem)
    return problem


def wait_opened(mirror: Mirror | None, sweep: SweepDir, timeout_s: float = 600.0) -> str:
    """Wait until the parent run exists; returns the error message, empty on success."""
    give_up_at = time.monotonic() + timeout_s
    while mirror:
        code = mirror.poll()
        if (report := read_report(sweep)).get("pid") == mirror.pid:
            return str(report["problem"])
        if code is not None:
            return f"the upload process ended with exit code {code}, see {sweep.mirror_log}"
        if time.monotonic() > give_up_at:
            return f"process {mirror.pid} is still creating the parent run in MLflow, see {sweep.mirror_log}"
        time.sleep(0.05)
    return ""


def wait_sweep_mirror(mirror: Mirror | None, sweep: SweepDir, timeout_s: float = 60.0) -> SweepResult:
    """Wait until the sweep is uploaded; call it after ``queueing`` has ended.

    If another queue still runs the same sweep, the upload process continues, and this returns after ``timeout_s``.
    """
    if mirror is None:
        return SweepResult(0, "tracking=offline")
    code = _exit_code(mirror, timeout_s)
    report = read_report(sweep)
    message = _message(code, mirror.pid, sweep.mirror_log, sweep.read().get("mlflow") or {}, report)
    incomplete, webhook = 0 if code == 0 else int(report.get("incomplete", 0)), str(report.get("webhook") or "")
    return SweepResult(incomplete, message, report.get("also") or {}, webhook)


def _message(code: int | None, pid: int, log: Path, ids: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """How to open the run or sweep in MLflow, or why the upload is incomplete; ``code``: None while it continues."""
    if code == 0:
        return ids.get("url") or (f"mlflow ui --backend-store-uri {ids['uri']}" if ids else "")
    if code is None:
        return f"process {pid} is still uploading, see {log}"
    return report.get("problem") or f"the upload process ended with exit code {code}, see {log}"


def _exit_code(mirror: Mirror, timeout_s: float) -> int | None:
    """The exit code of the upload process; None if it continues after ``timeout_s``."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        mirror.wait(timeout_s)
    return mirror.returncode


def _warn(problem: str) -> None:
    if problem:
        print(f"MLflow: {problem}; training continues, upload later: python -m runner sync", file=sys.stderr)


def _start(sweep: SweepDir, mode: str) -> Mirror | None:
    if not any(is_mirrored(rundir) for rundir in sweep.rundirs()):
        return None
    command = [sys.executable, "-P", "-m", "runner.mirror", mode, str(sweep.path)]
    return mirror_process(command, sweep.mirror_log)


def is_mirrored(rundir: RunDir) -> bool:
    """Whether the configuration of the run is readable and has an MLflow store."""
    try:
        return manifest.tracker(rundir) == "mlflow"
    except (RunnerError, KeyError, TypeError):
        return False


def start_mirror(rundir: RunDir) -> Mirror | None:
    """Start the process that uploads ``rundir`` to MLflow; None with ``tracking=offline``.

    It has its own session: neither Ctrl-C nor the end of this process stops it. Its last argument is the time stamp of
    the current state.json, so that it can recognise a newer state.
    """
    if manifest.tracker(rundir) == "offline":
        return None
    command = [sys.executable, "-P", "-m", "runner.mirror", str(rundir.path), str(rundir.read_state().updated)]
    return mirror_process(command, rundir.mirror_log)


def mirror_process(command: list[str], log: Path) -> Mirror:
    """Start an upload process in its own session: it outlives this process, and Ctrl-C does not stop it."""
    # The process mostly waits: one thread is enough. No telemetry, whatever the user's environment.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **settings},
        )


@dataclass(frozen=True)
class MirrorResult:
    """Result of the upload of a run."""

    url: str | None
    """Page of the run on an MLflow server; else None."""
    unsent: int
    """Records that are not in MLflow yet."""
    message: str
    """How to open the run in MLflow, or why the upload is incomplete; ``python -m runner sync`` completes it."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Each tracker of ``tracking.also`` → why it does not have everything; empty if it has."""
    webhook: str = ""
    """Why the message to ``tracking.webhook`` was not sent."""


def wait_mirror(proc: Mirror | None, rundir: RunDir, timeout_s: float = 60.0) -> MirrorResult:
    """Wait until the run is uploaded, the upload process has given up, or ``timeout_s`` has passed."""
    if proc is None:
        return MirrorResult(None, len(read(rundir)), "tracking=offline")
    code = _exit_code(proc, timeout_s)
    ids, report = rundir.read_manifest().get("mlflow") or {}, read_report(rundir)
    # A killed upload process may have sent more than it reported: this is an upper bound.
    unsent = 0 if code == 0 else max(0, len(read(rundir)) - int(report.get("sent", 0)))
    message = _message(code, proc.pid, rundir.mirror_log, ids, report)
    also, webhook = report.get("also") or {}, str(report.get("webhook") or "")
    return MirrorResult(ids.get("url"), unsent, message, also, webhook)


def read_report(folder: RunDir | SweepDir) -> dict[str, Any]:
    """Progress of the upload from mirror.json; empty if there is none.

    Of a run {sent, unsent, problem, uploaded, also, webhook}, of a sweep {pid, opened, incomplete, problem,
    also, webhook}.
    """
    try:
        return dict(json.loads(folder.mirror_report.read_text()))
    except (OSError, ValueError):
        return {}
