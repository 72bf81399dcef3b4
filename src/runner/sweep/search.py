"""Run a search: Optuna proposes parameters, each proposal is trained as a run of a sweep, its result goes to Optuna.

The next run is proposed as soon as one ends. The sweep's folder contains everything, also Optuna's journal: the same
command continues an interrupted search, unfinished runs first.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from runner import files, terminal
from runner.config import compose
from runner.config.bind import bind
from runner.config.compose import Composer
from runner.config.job import Job
from runner.errors import ConfigError, Fault, ResumeError, RunnerError, TrainingError
from runner.launch import prepare
from runner.sweep import algorithms, folder, space, study, trials
from runner.sweep.session import Session
from runner.sweep.space import Dimension
from runner.tracking.state_file import DONE
from runner.tracking.sweepdir import SweepDir

FIXED_KEYS = ("launcher", "search", "tracking")
"""Config groups that cannot be searched over: the search itself uses them."""


def chosen_by(composer: Composer) -> algorithms.Search | None:
    """The search that a command line chooses; None for ``search=grid``."""
    node = composer.chosen("search")
    if isinstance(node.get("space"), dict):
        space.refuse_listed(node["space"])
    chosen: algorithms.Search | None = bind(node, "search")()
    return chosen


def run(composer: Composer, settings: algorithms.Search, argv: list[str]) -> int:
    """Search until ``search.trials`` runs have ended; returns the exit code.

    Raises:
        ConfigError, ResumeError, LaunchError: the search is refused; nothing was written.
    """
    dimensions = _dimensions(composer, settings)
    session = Session(composer, argv)
    try:
        probes = session.composed(_probes(composer, dimensions), 0)
    except ConfigError as error:
        raise space.explained(error, dimensions) from error
    sweep, launcher = SweepDir(Path(probes[0].sweep_dir)), prepare.launcher_of(probes[0].cfg)
    algorithms.refuse_unlogged(settings, probes[0].cfg)
    launcher.check(settings.at_once)
    folder.refuse(sweep)
    with _locked(sweep):
        loaded = study.load_or_create(settings, dimensions, study.fixed_for_all(probes), sweep)
        sweep.cancel_request.unlink(missing_ok=True)
        source = trials.Trials(session, settings, dimensions, sweep, loaded, retry=bool(probes[0].cfg["retry"]))
        try:
            code = launcher.serve(source, sweep, settings.at_once)
        except RunnerError as error:
            raise error if not session.entries else TrainingError(*error.faults) from error
    source.print_best()
    if sweep.cancel_request.exists():
        return 130
    ended = session.end() if session.entries else 0
    is_unfinished = any(entry.rundir.read_state().status not in DONE for entry in session.entries)
    return code or ended or int(is_unfinished or bool(study.failures(source.study)))


def planned(composer: Composer, settings: algorithms.Search) -> Job:
    """Dry run: check a job for every category and both ends of every range; returns the first. Writes nothing.

    Raises:
        ConfigError: all faults of these jobs.
    """
    dimensions = _dimensions(composer, settings)
    jobs = composer.jobs(_probes(composer, dimensions))
    try:
        prepare.admit(jobs)
    except ConfigError as error:
        raise space.explained(error, dimensions) from error
    algorithms.refuse_unlogged(settings, jobs[0].cfg)
    over = ", ".join(f"{each.key}={each.text}" for each in dimensions)
    terminal.print_line(f"search={settings.kind} proposes {settings.trials} runs over {over}; one of them:")
    return jobs[0]


def _dimensions(composer: Composer, settings: algorithms.Search) -> list[Dimension]:
    """The dimensions of the search space; also names the sweep by them."""
    composer.refuse_swept()
    dimensions = space.dimensions(composer.parser, composer.swept, settings.space)
    fixed = (*FIXED_KEYS, *compose.ONE_A_SWEEP, "hydra")
    problem = "cannot be searched over: all runs of a search share it"
    if faults := [
        Fault(each.key, problem, "set one value", each.text) for each in dimensions if each.key.split(".")[0] in fixed
    ]:
        raise ConfigError(*faults)
    composer.sweep_name = f"{settings.kind}-{compose.named_by(each.key for each in dimensions)}"
    return dimensions


def _probes(composer: Composer, dimensions: list[Dimension]) -> list[list[str]]:
    """Overrides to check: every category and both ends of every range, combined with the first values of the others."""
    first = [f"{each.key}={each.extremes()[0]}" for each in dimensions]
    return [
        [*composer.fixed, *first[:place], f"{each.key}={value}", *first[place + 1 :]]
        for place, each in enumerate(dimensions)
        for value in each.extremes()
    ]


@contextlib.contextmanager
def _locked(sweep: SweepDir) -> Iterator[None]:
    """Hold the search's lock file: only one process proposes runs of a sweep.

    Raises:
        ResumeError: another process holds the lock.
    """
    with files.writing(sweep.path):
        sweep.path.mkdir(parents=True, exist_ok=True)
        handle = sweep.search_lock.open("a")
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by forked processes
        except OSError as error:
            command = f"python -m runner status {terminal.typed(sweep.path)}"
            remedy = f"{command} shows its progress; start another search with sweep=NAME"
            raise ResumeError(Fault("search", "another process runs this search", remedy, sweep.path)) from error
        yield
