"""The verb ``cancel``: end waiting and running runs, and print the new status of each."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from runner.cli.args import Args, Verb
from runner.errors import RunnerError
from runner.files import at_once, write_atomic
from runner.tracking import lock_holders, lookup, run_status
from runner.tracking.machine import user
from runner.tracking.mirror import backlog
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import FINAL
from runner.tracking.sweepdir import SweepDir

VERB = Verb(
    "cancel RUN|SWEEP …",
    """Ends runs. A running run saves its state first; a waiting run, here or in Slurm, never starts. For a sweep: all
its runs that have not ended. Each gets the status killed, in its folder and in MLflow.

  python -m runner cancel outputs/2026-01-31/12-00-00
  python -m runner cancel ablation                       every unfinished run of that sweep
  python -m runner cancel ablation/lora.r=8 123_4        one of its runs, and a Slurm job

RUN is a run folder, a name, a Slurm job id, or the beginning of an MLflow run id. A cancelled run can continue
where it stopped: resume=RUN, or the same command again for a sweep.
The exit code is 0 if all of them have ended, 1 if one is still saving or cannot be ended from this machine.""",
)

WAIT_S = 20.0
"""Seconds to wait for runs to end: enough for most steps and checkpoints. Slower runs end later by themselves."""
POLL_S, SLURM_POLL_S = 0.2, 2.0
OVER = (*FINAL, "missing", "damaged")


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, an unknown run, or an unknown option.
    """
    args = VERB.read(argv)
    if not args.words:
        raise VERB.misused("needs a run or a sweep")
    before = run_status.of(_named_runs(args))
    _print_ended([run for run in before if run.status in OVER])
    cancellation = _Cancellation([run for run in before if run.status not in OVER])
    after = cancellation.run()
    for run in after:
        print(f"{run.label}: {cancellation.outcome(run)}", flush=True)
    backlog.upload_ended([run.rundir for run in [*before, *after] if run.status in FINAL])
    return int(any(run.status not in OVER for run in after))


def _named_runs(args: Args) -> list[RunDir]:
    """The named runs and the runs of named sweeps, each once. Also stops the proposals of a named search."""
    rundirs: dict[Path, RunDir] = {}
    for word in args.words:
        folder = lookup.resolve(word, args.outputs_dir)
        if isinstance(folder, SweepDir) and folder.search_journal.exists():  # else the search starts its next run
            write_atomic(folder.cancel_request, f"cancelled by {user()}@{run_status.here()}")
        for rundir in [folder] if isinstance(folder, RunDir) else lookup.runs_of(folder):
            rundirs.setdefault(rundir.path, rundir)
    return list(rundirs.values())


def _print_ended(runs: Sequence[RunStatus]) -> None:
    if len(runs) == 1:
        print(f"{runs[0].label}: nothing to cancel, the run is {runs[0].status}")
    elif runs:
        counts = Counter(run.status for run in runs)
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"nothing to cancel: {len(runs)} runs have ended already ({text})")


@dataclass
class _Cancellation:
    """Runs that are being ended."""

    runs: list[RunStatus]
    problems: dict[Path, str] = field(default_factory=dict)
    """Run folder → why this process cannot end the run."""
    signalled: set[tuple[Path, int]] = field(default_factory=set)
    """(run folder, process) that received SIGTERM; a second SIGTERM would interrupt saving."""

    def run(self) -> list[RunStatus]:
        """End the runs and wait up to ``WAIT_S`` seconds; returns their new status."""
        self._request()
        self._cancel_jobs()
        deadline = time.monotonic() + WAIT_S
        while True:
            runs = run_status.of([run.rundir for run in self.runs])
            at_once(partial(run_status.write, run, "killed", _reason(run)) for run in self._without_worker(runs))
            for run in runs:  # after the waiting runs: else their queue starts the next one
                self._stop(run)
            runs = run_status.of([run.rundir for run in runs])
            if not self._possible(runs) or time.monotonic() > deadline:
                return runs
            time.sleep(SLURM_POLL_S if any(run.job for run in runs) else POLL_S)

    def outcome(self, run: RunStatus) -> str:
        """The result of cancelling a run, as a line for the terminal."""
        if problem := self.problems.get(run.rundir.path):
            return f"not cancelled: {problem}"
        if run.status not in OVER:
            return f"{run.status}, stop requested: it saves its state first; python -m runner status shows its end"
        step = f" at step {run.state.step}/{run.state.total_steps}" if run.state.total_steps else ""
        return f"{run.status}{step}{': ' + run.reason if run.reason else ''}"

    def _request(self) -> None:
        """Write the request into the folders first: a worker that is stopped reads the reason there."""
        for run in self.runs:
            is_elsewhere = run.status == "running" and run.state.host not in ("", run_status.here())
            if run.job is None and (is_elsewhere or run.status == "unknown"):
                self.problems[run.rundir.path] = run.reason or f"it runs on {run.state.host}: cancel it there"
                continue
            try:
                write_atomic(run.rundir.cancel_request, _reason(run), is_durable=False)
            except OSError as error:
                self.problems[run.rundir.path] = f"its folder cannot be written ({error.strerror})"

    def _cancel_jobs(self) -> None:
        from runner.tracking import slurm_client

        jobs = {run.rundir.path: run.job.ref for run in self._possible(self.runs) if run.job and run.job.is_active}
        try:
            slurm_client.cancel(jobs.values())
        except RunnerError as error:
            for run in self.runs:
                if run.rundir.path in jobs:
                    run.rundir.cancel_request.unlink(missing_ok=True)
                    self.problems[run.rundir.path] = str(error)

    def _possible(self, runs: Iterable[RunStatus]) -> list[RunStatus]:
        return [run for run in runs if run.status not in OVER and run.rundir.path not in self.problems]

    def _without_worker(self, runs: Iterable[RunStatus]) -> list[RunStatus]:
        """Runs that no worker holds, and that no active Slurm job will start."""
        free = [run for run in self._possible(runs) if not run.rundir.is_alive()]
        return [run for run in free if run.job is None or not run.job.is_active]

    def _stop(self, run: RunStatus) -> None:
        """Send SIGTERM to the worker of a run, or to the process that will start it. Slurm signals its own jobs."""
        if (run.job is not None and run.job.is_active) or run not in self._possible([run]):
            return
        pid = lock_holders.holder(run.rundir) if run.rundir.is_alive() else run_status.supervisor(run)
        if pid is None or (run.rundir.path, pid) in self.signalled:
            return
        try:
            os.kill(pid, signal.SIGTERM)
            self.signalled.add((run.rundir.path, pid))
        except ProcessLookupError:
            return  # it has just ended
        except PermissionError:
            self.problems[run.rundir.path] = f"its process {pid} belongs to another user"


def _reason(run: RunStatus) -> str:
    moment = "" if run.state.attempt or run.status in ("running", "starting") else " before it started"
    return f"cancelled{moment} by {user()}@{run_status.here()}"
