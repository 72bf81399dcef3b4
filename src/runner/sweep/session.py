"""A sweep at work: lists of overrides → checked jobs → prepared folders → a launcher → a table of how it went."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext

from runner import files
from runner.config.compose import Composer, Job
from runner.errors import ConfigError, Fault, LaunchError
from runner.launch import prepare
from runner.launch.prepare import prepared
from runner.sweep import folder, table
from runner.tracking import resume
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


@dataclass
class Entry:
    """One job of the command, and what came of it."""

    wanted: folder.Wanted
    rundir: RunDir
    code: int | None
    """The exit code of its worker; None where none was started."""


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
    except OSError as error:  # other sweepers than ours write into the folder of the sweep first
        folder = Path(master.hydra.sweep.dir).absolute()
        if session.has_launched or not files.is_of_outputs(error, folder):
            raise
        raise ConfigError(files.outputs_fault(error, folder)) from error
    return session.end()


class Session:
    """What ``-m`` gives to Hydra in the place of a task function: it takes jobs from a sweeper and launches them."""

    def __init__(self, composer: Composer, argv: list[str]) -> None:
        self.composer, self.command = composer, ["python", "-m", "runner", *argv]
        self.entries: list[Entry] = []
        self.is_detached = False
        self.has_launched = False

    def __call__(self, *_: object) -> None:
        raise AssertionError("Hydra runs no job itself: hydra/launcher=runner does")

    def grid(self, arguments: Sequence[str]) -> list[list[str]]:
        return self.composer.grid(arguments)

    def launch(self, batch: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Bring these jobs to their end, or hand them over; returns their objectives for the sweeper.

        Raises:
            ConfigError, ResumeError, LaunchError: refused, before anything was written.
        """
        jobs = self.composed(batch, first)
        labels = [self.composer.label(overrides) for overrides in batch]
        sweep = SweepDir(Path(jobs[0].sweep_dir))
        launchers = prepare.by_launcher(job.cfg for job in jobs)
        for launcher, _ in launchers:
            launcher.check()
        entries = self.prepared(sweep, jobs, labels)
        self._tell_what_is_there(entries)
        self._launch(sweep, entries, launchers)
        self.entries += [entry for entry in entries if entry.rundir.path not in {e.rundir.path for e in self.entries}]
        return [_returned(entry, list(overrides)) for entry, overrides in zip(entries, batch, strict=True)]

    def composed(self, batch: Sequence[Sequence[str]], first: int) -> list[Job]:
        """A checked job for each list of overrides.

        Raises:
            ConfigError, ResumeError: with all that is wrong with them.
        """
        jobs = self.composer.jobs(batch, first)
        prepare.admit(jobs)
        for job in jobs:
            resume.refuse_resume(job.cfg)
        return jobs

    def prepared(self, sweep: SweepDir, jobs: list[Job], labels: list[str]) -> list[Entry]:
        """Every job with its folder, prepared if it is new."""
        name = str(jobs[0].cfg["sweep"])
        wanted = [folder.Wanted(job.cfg, label, job.folder) for job, label in zip(jobs, labels, strict=True)]
        with files.writing(sweep.path), folder.joined(sweep, name, self.command, wanted) as rundirs:
            for rundir, job, each in zip(rundirs, jobs, wanted, strict=True):
                prepared(job, rundir.path, self.command, sweep=name, label=each.label)
        return [Entry(each, rundir, None) for each, rundir in zip(wanted, rundirs, strict=True)]

    def end(self) -> int:
        """Tell how every job ended; returns the exit code of the command."""
        codes = [entry.code for entry in self.entries]
        states = [entry.rundir.read_state().status for entry in self.entries]
        table.sweep([(entry.wanted.label, entry.rundir) for entry in self.entries], is_detached=self.is_detached)
        for stopped in (130, 75):
            if stopped in codes:
                return stopped
        return int("failed" in states or any(code not in (0, None) for code in codes))

    def _tell_what_is_there(self, entries: list[Entry]) -> None:
        states = [entry.rundir.read_state().status for entry in _distinct(entries)]
        done, failed = states.count("completed"), states.count("failed")
        if twins := len(entries) - len(states):
            print(f"{twins} of these jobs are the same as others: each is run once", file=sys.stderr)
        if done:
            print(f"{done} of {len(states)} jobs are completed already: skipped", file=sys.stderr)
        if failed and not all(entry.wanted.cfg["retry"] for entry in entries):
            print(f"{failed} of {len(states)} jobs failed before; retry=true tries them again", file=sys.stderr)

    def _tell_what_is_left(self, entries: list[Entry], started: set[Path]) -> None:
        """After a stop: what other launchers would have been given."""
        left = [each for each in _distinct(entries) if each.rundir.path not in started]
        left = [each for each in left if folder.has_to_work(each.rundir, each.wanted.cfg["retry"])]
        if left:
            labels = ", ".join(entry.wanted.label for entry in left)
            print(f"stopped; not started of other launchers: {labels}", file=sys.stderr)

    def _launch(self, sweep: SweepDir, entries: list[Entry], launchers: list[tuple[Any, list[int]]]) -> None:
        started: set[Path] = set()
        self.has_launched = True
        for launcher, numbers in launchers:
            todo = [entries[n] for n in numbers if entries[n].rundir.path not in started]
            todo = [each for each in _distinct(todo) if folder.has_to_work(each.rundir, each.wanted.cfg["retry"])]
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
                print(error, file=sys.stderr)  # those of another launcher were started: the table says which
                codes = [1] * len(todo)
            for entry, code in zip(todo, codes, strict=False):
                entry.code = code
            if any(code in (75, 130) for code in codes):
                self._tell_what_is_left(entries, started)
                break


def _distinct(entries: list[Entry]) -> list[Entry]:
    return list({entry.rundir.path: entry for entry in reversed(entries)}.values())[::-1]


def _returned(entry: Entry, overrides: list[str]) -> JobReturn:
    """What a sweeper of Hydra's learns of a job: its held-out loss, or that it failed."""
    state, failed = entry.rundir.read_state(), JobReturn(overrides=overrides, status=JobStatus.FAILED)
    if state.status == "completed":
        return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=state.summary.get("eval/loss"))
    failed._return_value = LaunchError(Fault("", f"{entry.wanted.label}: {state.status} {state.reason}".strip()))
    return failed
