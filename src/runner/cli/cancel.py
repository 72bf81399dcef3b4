"""The verb ``cancel``: ends runs, waiting or at work, and says of each how it stands then."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.cli import args
from runner.errors import ConfigError, Fault, RunnerError
from runner.files import write_atomic
from runner.tracking import lookup, run_status
from runner.tracking.machine import user
from runner.tracking.mirror import behind
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import FINAL, RunDir
from runner.tracking.sweepdir import SweepDir

HELP = """python -m runner cancel RUN|SWEEP … [outputs_dir=FOLDER]

Ends runs. One that is at work saves its state first; one that waits, here or in Slurm, never begins; a sweep: all of
its runs that are not over. Each ends as killed, in its folder and in MLflow.

  python -m runner cancel outputs/2026-01-31/12-00-00
  python -m runner cancel ablation                       every unfinished run of that sweep
  python -m runner cancel ablation/lora.r=8 123_4        one of its runs, and that job of Slurm

RUN is a run folder, a name, a Slurm job id, or the beginning of an MLflow run id. What was cancelled can be taken up
again where it stopped: resume=RUN, or the same command for a sweep.
The exit code is 0 if all of them are over, 1 if one is not yet (it saves) or can only be ended elsewhere."""

WAIT_S = 20.0
"""Long enough for most steps and checkpoints; what takes longer ends by itself."""
POLL_S, SLURM_POLL_S = 0.2, 2.0
OVER = (*FINAL, "missing", "damaged")


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, a word that is none, or no option.
    """
    words = args.read(argv, HELP)
    if words is None:
        return 0
    if not words.words:
        raise ConfigError(Fault("cancel", "needs a run or a sweep", HELP.splitlines()[0]))
    before = run_status.of(_meant(words))
    _say_over([run for run in before if run.status in OVER])
    ending = _Ending([run for run in before if run.status not in OVER])
    after = ending.bring_about()
    for run in after:
        print(f"{run.label}: {ending.told(run)}", flush=True)
    behind.tell_of([run.rundir for run in [*before, *after] if run.status in OVER])
    return int(any(run.status not in OVER for run in after))


def _meant(words: args.Args) -> list[RunDir]:
    """The runs that are named, those of sweeps included, each once."""
    found: dict[Path, RunDir] = {}
    for word in words.words:
        what = lookup.resolve(word, words.outputs_dir)
        if isinstance(what, SweepDir) and what.search_journal.exists():  # or the next run is proposed at once
            write_atomic(what.cancel_request, f"cancelled by {user()}@{run_status.here()}")
        for rundir in [what] if isinstance(what, RunDir) else lookup.runs_of(what):
            found.setdefault(rundir.path, rundir)
    return list(found.values())


def _say_over(runs: Sequence[RunStatus]) -> None:
    if len(runs) == 1:
        print(f"{runs[0].label}: nothing to cancel, it is {runs[0].status}")
    elif runs:
        counts = Counter(run.status for run in runs)
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"nothing to cancel in {len(runs)} runs that are over: {said}")


@dataclass
class _Ending:
    """Runs on their way to their end."""

    runs: list[RunStatus]
    problems: dict[Path, str] = field(default_factory=dict)
    """Run folder → why it cannot be ended from here."""
    signalled: set[tuple[Path, int]] = field(default_factory=set)
    """Run folder and process that was told; a second signal would cut its saving short."""

    def bring_about(self) -> list[RunStatus]:
        """End them and wait a little; returns how they stand then."""
        self._request()
        self._cancel_jobs()
        deadline = time.monotonic() + WAIT_S
        while True:
            runs = run_status.of([run.rundir for run in self.runs])
            for run in self._waiting(runs):
                run_status.write(run, "killed", _reason(run))
            for run in runs:  # only now: their queue would start the next at once
                self._stop(run)
            runs = run_status.of([run.rundir for run in runs])
            is_over = all(run.status in OVER or run.rundir.path in self.problems for run in runs)
            if is_over or time.monotonic() > deadline:
                return runs
            time.sleep(SLURM_POLL_S if any(run.job for run in runs) else POLL_S)

    def told(self, run: RunStatus) -> str:
        """How it stands, as a text for the person who cancelled it."""
        if problem := self.problems.get(run.rundir.path):
            return f"not cancelled: {problem}"
        if run.status not in OVER:
            return f"{run.status}, told to stop; it saves its state first, and status shows when it has ended"
        step = f" at step {run.state.step}/{run.state.total_steps}" if run.state.total_steps else ""
        return f"{run.status}{step}{': ' + run.reason if run.reason else ''}"

    def _request(self) -> None:
        """Leave word in the folders first: a worker that is stopped looks there for the reason."""
        for run in self.runs:
            is_elsewhere = run.status == "running" and run.state.host not in ("", run_status.here())
            if run.job is None and (is_elsewhere or run.status == "unknown"):
                self.problems[run.rundir.path] = run.reason or f"it runs on {run.state.host}; give the command there"
                continue
            try:
                write_atomic(run.rundir.cancel_request, _reason(run))
            except OSError as error:
                self.problems[run.rundir.path] = f"its folder cannot be written ({error.strerror})"

    def _cancel_jobs(self) -> None:
        from runner.tracking import slurm_client

        jobs = {run.rundir.path: run.job.id for run in self._possible(self.runs) if run.job and run.job.is_active}
        try:
            slurm_client.cancel(list(jobs.values()))
        except RunnerError as error:
            for run in self.runs:
                if run.rundir.path in jobs:
                    run.rundir.cancel_request.unlink(missing_ok=True)
                    self.problems[run.rundir.path] = str(error)

    def _possible(self, runs: Iterable[RunStatus]) -> list[RunStatus]:
        return [run for run in runs if run.status not in OVER and run.rundir.path not in self.problems]

    def _waiting(self, runs: Iterable[RunStatus]) -> list[RunStatus]:
        """Those that no worker holds, and none of Slurm's is about to."""
        free = [run for run in self._possible(runs) if not run.rundir.is_alive()]
        return [run for run in free if run.job is None or not run.job.is_active]

    def _stop(self, run: RunStatus) -> None:
        """SIGTERM to the worker that holds the folder here, or to what is about to start it; a job gets Slurm's."""
        if (run.job is not None and run.job.is_active) or run not in self._possible([run]):
            return
        pid = run_status.holder(run.rundir) if run.rundir.is_alive() else run_status.supervisor(run)
        if pid is None or (run.rundir.path, pid) in self.signalled:
            return
        try:
            os.kill(pid, signal.SIGTERM)
            self.signalled.add((run.rundir.path, pid))
        except ProcessLookupError:
            return  # it has ended this moment
        except PermissionError:
            self.problems[run.rundir.path] = f"its process {pid} belongs to somebody else"


def _reason(run: RunStatus) -> str:
    begun = "" if run.state.attempt or run.status in ("running", "starting") else " before it started"
    return f"cancelled{begun} by {user()}@{run_status.here()}"
