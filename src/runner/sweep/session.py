"""Run a sweep: compose and check jobs, prepare run folders, launch them, print a table of the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext

from runner import files
from runner.config.compose import Composer
from runner.config.job import Job
from runner.errors import ConfigError, Fault, LaunchError
from runner.launch import prepare
from runner.launch.prepare import prepared
from runner.sweep import folder, table
from runner.tracking import resume
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


@dataclass
class Entry:
    """One job of the command, its run folder and exit code."""

    job: folder.SweepJob
    rundir: RunDir
    code: int | None
    """Exit code of the worker; None if no worker was started."""


def sweep(hydra: Hydra, args: argparse.Namespace, composer: Composer, argv: list[str]) -> int:
    """Run the sweep of a command line through Hydra's sweeper; returns the exit code."""
    from hydra._internal.callbacks import Callbacks

    composer.refuse_swept()
    session = Session(composer, argv)
    master = composer.master()
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master))
    task_function: Any = session
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task_function, config=master)
    try:
        sweeper.sweep(list(args.overrides))
    except OSError as error:  # other Hydra sweepers write into the sweep's folder first
        path = Path(master.hydra.sweep.dir).absolute()
        if session.has_launched or not files.is_of_outputs(error, path):
            raise
        raise ConfigError(files.outputs_fault(error, path)) from error
    return session.end()


class Session:
    """Hydra's task function for ``-m``: receives jobs from a sweeper and launches them."""

    def __init__(self, composer: Composer, argv: list[str]) -> None:
        self.composer, self.command = composer, ["python", "-m", "runner", *argv]
        self.entries: list[Entry] = []
        self.is_detached = False
        self.has_launched = False

    def __call__(self, *_: object) -> None:
        raise AssertionError("Hydra must not run jobs: hydra/launcher=runner calls launch()")

    def grid(self, arguments: Sequence[str]) -> list[list[str]]:
        return self.composer.grid(arguments)

    def launch(self, batch: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Train or submit these jobs; returns their results for the sweeper.

        Raises:
            ConfigError, ResumeError, LaunchError: a job is refused; nothing was written.
        """
        jobs = self.composed(batch, first)
        labels = [self.composer.label(overrides) for overrides in batch]
        sweep = SweepDir(Path(jobs[0].sweep_dir))
        launchers = prepare.by_launcher(job.cfg for job in jobs)
        for launcher, _ in launchers:
            launcher.check()
        entries = self.prepared(sweep, jobs, labels)
        self._print_existing(entries)
        self._launch(sweep, entries, launchers)
        self.entries += [entry for entry in entries if entry.rundir.path not in {e.rundir.path for e in self.entries}]
        return [_returned(entry, list(overrides)) for entry, overrides in zip(entries, batch, strict=True)]

    def composed(self, batch: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Compose and check a job for each list of overrides.

        Raises:
            ConfigError, ResumeError: all faults of these jobs.
        """
        jobs = self.composer.jobs(batch, first)
        prepare.admit(jobs)
        for job in jobs:
            resume.refuse_resume(job.cfg)
        return jobs

    def prepared(self, sweep: SweepDir, jobs: list[Job], labels: list[str]) -> list[Entry]:
        """Find or create the run folder of each job."""
        name = str(jobs[0].cfg["sweep"])
        added = [folder.SweepJob(job.cfg, label, job.folder) for job, label in zip(jobs, labels, strict=True)]
        with files.writing(sweep.path), folder.adding(sweep, name, self.command, added) as rundirs:
            tasks = {
                rundir.path: partial(prepared, job, rundir.path, self.command, sweep=name, label=label)
                for rundir, job, label in reversed(list(zip(rundirs, jobs, labels, strict=True)))
            }  # of jobs with the same configuration, which have one folder, the first
            files.at_once(reversed(tasks.values()))
        return [Entry(job, rundir, None) for job, rundir in zip(added, rundirs, strict=True)]

    def end(self) -> int:
        """Print the table of all jobs; returns the exit code of the command."""
        codes = [entry.code for entry in self.entries]
        states = [entry.rundir.read_state().status for entry in self.entries]
        table.sweep([(entry.job.label, entry.rundir) for entry in self.entries], is_detached=self.is_detached)
        for stopped in (130, 75):
            if stopped in codes:
                return stopped
        return int("failed" in states or any(code not in (0, None) for code in codes))

    def _print_existing(self, entries: list[Entry]) -> None:
        states = [entry.rundir.read_state().status for entry in _distinct(entries)]
        done, failed = states.count("completed"), states.count("failed")
        if twins := len(entries) - len(states):
            print(f"{twins} jobs are duplicates of others: each configuration is run once", file=sys.stderr)
        if done:
            print(f"{done} of {len(states)} jobs are already completed: skipped", file=sys.stderr)
        if failed and not all(entry.job.cfg["retry"] for entry in entries):
            print(f"{failed} of {len(states)} jobs failed before; retry them with retry=true", file=sys.stderr)

    def _print_not_started(self, entries: list[Entry], started: set[Path]) -> None:
        """After a stop: print the jobs of the launchers that were not called."""
        remaining = [each for each in _distinct(entries) if each.rundir.path not in started]
        labels = [each.job.label for each in remaining if folder.needs_worker(each.rundir, each.job.cfg["retry"])]
        if labels:
            print(f"stopped; jobs of other launchers were not started: {', '.join(labels)}", file=sys.stderr)

    def _launch(self, sweep: SweepDir, entries: list[Entry], launchers: list[tuple[Any, list[int]]]) -> None:
        started: set[Path] = set()
        self.has_launched = True
        for launcher, numbers in launchers:
            todo = [entries[n] for n in numbers if entries[n].rundir.path not in started]
            todo = [each for each in _distinct(todo) if folder.needs_worker(each.rundir, each.job.cfg["retry"])]
            started |= {entry.rundir.path for entry in todo}
            if not todo:
                continue
            for entry in todo:
                entry.rundir.forget_requests()
            self.is_detached = self.is_detached or launcher.is_detached
            try:
                codes = launcher.launch([entry.rundir for entry in todo], sweep)
            except LaunchError as error:
                if all(entry.code is None for entry in entries):
                    raise
                print(error, file=sys.stderr)  # jobs of another launcher were started: the table shows them
                codes = [1] * len(todo)
            for entry, code in zip(todo, codes, strict=False):
                entry.code = code
            if any(code in (75, 130) for code in codes):
                self._print_not_started(entries, started)
                break


def _distinct(entries: list[Entry]) -> list[Entry]:
    return list({entry.rundir.path: entry for entry in reversed(entries)}.values())[::-1]


def _returned(entry: Entry, overrides: list[str]) -> JobReturn:
    """Result of a job for Hydra's sweeper: the evaluation loss, or a failure."""
    state, failed = entry.rundir.read_state(), JobReturn(overrides=overrides, status=JobStatus.FAILED)
    if state.status == "completed":
        return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=state.summary.get("eval/loss"))
    failed._return_value = LaunchError(Fault("", f"{entry.job.label}: {state.status} {state.reason}".strip()))
    return failed
