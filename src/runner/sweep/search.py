"""A search at work: Optuna proposes, each proposal becomes a run of a sweep, and how it ended is told to Optuna.

As soon as one run ends the next is proposed. Everything lies in the sweep's folder, Optuna's journal too: the same
command goes on after any end, with the runs that had begun first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import files, terminal
from runner.config import compose
from runner.config.bind import bind
from runner.config.compose import Composer
from runner.errors import ConfigError, Fault, ResumeError, RunnerError, TrainingError
from runner.files import stamp
from runner.launch import prepare
from runner.sweep import algorithms, folder, space, study
from runner.sweep.asha import Halving
from runner.sweep.session import Session
from runner.sweep.space import Dimension
from runner.tracking import metrics_log
from runner.tracking.rundir import DONE, RunDir
from runner.tracking.sweepdir import SweepDir

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

LOOK_EVERY_S = 0.1
"""Between two looks at the runs that go on: at the time stamps of their records, so that few steps are wasted."""
FIXED_KEYS = ("launcher", "search", "tracking")
"""Groups that a search cannot look through: it is itself done with them."""


def asked_for(composer: Composer) -> algorithms.Search | None:
    """The search that a command line chooses; None where it is a grid."""
    node = composer.chosen("search")
    if isinstance(node.get("space"), dict):
        space.refuse_listed(node["space"])
    made: algorithms.Search | None = bind(node, "search")()
    return made


def run(composer: Composer, wanted: algorithms.Search, argv: list[str]) -> int:
    """Search until there are as many runs as are wanted; returns the exit code.

    Raises:
        ConfigError, ResumeError, LaunchError: refused, before anything was written.
    """
    dimensions = _dimensions(composer, wanted)
    session = Session(composer, argv)
    try:
        probes = session.composed(_probes(composer, dimensions), 0)
    except ConfigError as error:
        raise space.explained(error, dimensions) from error
    sweep, launcher = SweepDir(Path(probes[0].sweep_dir)), prepare.launcher_of(probes[0].cfg)
    algorithms.refuse_unlogged(wanted, probes[0].cfg)
    launcher.check(wanted.at_once)
    folder.refuse(sweep)
    with _alone(sweep):
        known = study.taken_up(wanted, dimensions, study.fixed_for_all(probes), sweep)
        sweep.cancel_request.unlink(missing_ok=True)
        trials = Trials(session, wanted, dimensions, sweep, known, retry=bool(probes[0].cfg["retry"]))
        try:
            code = launcher.serve(trials, sweep, wanted.at_once)
        except RunnerError as error:
            raise error if not session.entries else TrainingError(*error.faults) from error
    trials.tell_best()
    if sweep.cancel_request.exists():
        return 130
    ended = session.end() if session.entries else 0
    is_undone = any(entry.rundir.read_state().status not in DONE for entry in session.entries)
    return code or ended or int(is_undone or bool(study.failures(trials.study)))


def planned(composer: Composer, wanted: algorithms.Search) -> compose.Job:
    """Check one job for each category and each end of a range; returns the first. Nothing is written.

    Raises:
        ConfigError: with all that is wrong with them.
    """
    dimensions = _dimensions(composer, wanted)
    jobs = composer.jobs(_probes(composer, dimensions))
    try:
        prepare.admit(jobs)
    except ConfigError as error:
        raise space.explained(error, dimensions) from error
    algorithms.refuse_unlogged(wanted, jobs[0].cfg)
    over = ", ".join(f"{each.key}={each.text}" for each in dimensions)
    terminal.say(f"search={wanted.kind} proposes {wanted.trials} runs over {over}; one of them:")
    return jobs[0]


class Trials:
    """Proposes runs; see launch/protocol.py: Source."""

    def __init__(
        self, session: Session, wanted: algorithms.Search, dimensions: list[Dimension], sweep: SweepDir, known: Study,
        *, retry: bool,
    ) -> None:  # fmt: skip
        self.session, self.wanted, self.dimensions, self.sweep = session, wanted, dimensions, sweep
        self.study = known
        self.live: dict[Path, list[Trial]] = {}
        """Folder of a run that goes on → the trials that it stands for: two proposals may be the same run."""
        self.halving = Halving(wanted.rungs, sweep.rundirs()) if wanted.rungs else None
        self.begun = deque(self._begun())
        if retry:
            self._enqueue_failed()
        self._looked, self._seen = 0.0, {}  # type: float, dict[Path, tuple[int, ...]]
        self._before = self._ended()

    @property
    def total(self) -> int:
        """Runs that this process has to do: those that are wanted less those that had come to something before."""
        return max(0, self.wanted.trials - self._before)

    def next(self) -> RunDir | None:
        while not self.sweep.cancel_request.exists() and (self.begun or self._is_more()):
            trial = self.begun.popleft() if self.begun else self._ask()
            if (rundir := self._prepared(trial)) is None:
                continue
            is_there = rundir.path in self.live
            self.live.setdefault(rundir.path, []).append(trial)
            if is_there:
                continue
            rung = trial.user_attrs.get("promoted")  # unless it has gone on since, before this process came
            if self.halving and rundir.path in self.halving.paused and rung == self.halving.top(rundir):
                self.halving.resume(rundir)
            if folder.has_to_work(rundir, retry=bool(trial.user_attrs.get("is_retried"))):
                rundir.forget_cancel()
                if rundir.read_state().status == "failed":  # and is asked for anew
                    rundir.forget_requests()
                return rundir
            self.ended(rundir)
        return None

    def ended(self, rundir: RunDir) -> None:
        """Tell what came out; of a run that was stopped nothing is told: it is taken up by the same command."""
        from optuna.trial import TrialState

        self._report(rundir)
        if self.halving:
            self.halving.ended(rundir, rundir.read_state().status)
        state, trials = rundir.read_state(), self.live.pop(rundir.path, [])
        values = {metric: value_of(rundir, metric) for metric in self.wanted.objectives}
        lacking = [metric for metric, value in values.items() if value is None]
        if trials and state.status == "completed" and lacking:
            terminal.say(f"{rundir.path.name} is completed, but counts as failed: it has no {' and no '.join(lacking)}")
        for trial in trials:
            if state.status == "completed" and not lacking:
                self.study.tell(trial, [value for value in values.values() if value is not None])
            elif state.status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            elif state.status in ("completed", "failed"):
                self.study.tell(trial, state=TrialState.FAIL)

    def look(self) -> None:
        """Compare the runs that go on, where the search lets only some of them."""
        if self.halving is None or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        for path in list(self.live):
            rundir = RunDir(path)
            if (seen := stamp(rundir.metrics)) != self._seen.get(path):
                self._seen[path] = seen
                self._report(rundir)
                passed = max(trial.user_attrs.get("passed", -1) for trial in self.live[path])
                if (rung := self.halving.top(rundir)) > passed and self.halving.goes_on(rundir):
                    for trial in self.live[path]:
                        trial.set_user_attr("passed", rung)

    def tell_best(self) -> None:
        """The best run, or those that no other beats in all objectives."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        last = {json.dumps(study.params_of(trial), sort_keys=True): trial.state for trial in trials}  # of what went on
        counts = {state.name.lower(): list(last.values()).count(state) for state in TrialState}
        terminal.say("search   " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
        for best in self.study.best_trials if done else []:
            values = ", ".join(f"{m} {v:.6g}" for m, v in zip(self.wanted.objectives, best.values, strict=True))
            terminal.say(f"best     {values}  {self._label(best.params)}  {best.user_attrs.get('folder', '')}")
        if failed := study.failures(self.study):
            labels = dict.fromkeys(self._label(study.params_of(trial)) for trial in failed)
            terminal.say(f"failed   {'; '.join(labels)}: retry=true tries again")

    def _ask(self) -> Trial:
        return self.study.ask({each.key: each.distribution() for each in self.dimensions})

    def _prepared(self, trial: Trial) -> RunDir | None:
        """The run of a proposal; None where that cannot be run, which Optuna is told."""
        from optuna.trial import TrialState

        values = [each.override(trial.params[each.key]) for each in self.dimensions]
        try:
            jobs = self.session.composed([[*self.session.composer.fixed, *values]], trial.number)
        except ConfigError as error:
            terminal.say(f"trial {trial.number} cannot be run: {error}")
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        (entry,) = self.session.prepared(self.sweep, jobs, [self._label(trial.params)])
        if entry.rundir.path not in {known.rundir.path for known in self.session.entries}:
            self.session.entries.append(entry)
        trial.set_user_attr("folder", entry.rundir.path.name)
        return entry.rundir

    def _report(self, rundir: RunDir) -> None:
        """Tell Optuna what the run's evaluations said."""
        if self.halving is None:
            return
        values = self.halving.look(rundir)
        for trial in self.live.get(rundir.path, []):
            told = self.study._storage.get_trial(trial._trial_id).intermediate_values
            for step in sorted(values.keys() - told.keys()):
                trial.report(values[step], step)

    def _promote(self) -> bool:
        """Propose again a run that was given up and has come to be ahead."""
        if self.halving is None:
            return False
        is_last = not self.live and not self._is_new_wanted()
        if not (found := self.halving.promoted(is_last=is_last)):
            return False
        rundir, rung = found
        trial = next(trial for trial in self._trials() if trial.user_attrs.get("folder") == rundir.path.name)
        marks = {"promoted": rung, "passed": rung}
        self.study.enqueue_trial(study.params_of(trial), user_attrs=marks)
        return True

    def _begun(self) -> Iterator[Trial]:
        """What an earlier process proposed and was not told the end of."""
        import optuna
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            yield optuna.trial.Trial(self.study, trial._trial_id)

    def _is_more(self) -> bool:
        """Whether a trial is to be proposed, or again."""
        from optuna.trial import TrialState

        is_waiting = any(trial.state == TrialState.WAITING for trial in self._trials())
        return is_waiting or self._promote() or self._is_new_wanted()

    def _is_new_wanted(self) -> bool:
        """Whether there are fewer runs than are wanted; what is tried again, or goes on, counts once."""
        return (
            sum(not {"is_retried", "promoted"} & trial.user_attrs.keys() for trial in self._trials())
            < self.wanted.trials
        )

    def _ended(self) -> int:
        """How many runs have ended; one that is tried again, or goes on, has not."""
        last = {json.dumps(study.params_of(trial), sort_keys=True): trial.state for trial in self._trials()}
        return sum(state.is_finished() for state in last.values())

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _enqueue_failed(self) -> None:
        """Propose again what failed and has not come to anything since, each once."""
        from optuna.trial import TrialState

        under_way = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING, TrialState.RUNNING])
        proposed = [study.params_of(trial) for trial in under_way]
        for params in map(study.params_of, study.failures(self.study)):
            if params not in proposed:
                self.study.enqueue_trial(params, user_attrs={"is_retried": True})
                proposed.append(params)

    def _label(self, values: dict[str, Any]) -> str:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        return ",".join(f"{key}={value}" for key, value in shown.items())


def value_of(rundir: RunDir, metric: str) -> float | None:
    """The metric at the end of a run; None where it is not a number."""
    found = rundir.read_state().summary.get(metric)
    if found is None:
        found = next((record[metric] for record in reversed(metrics_log.read(rundir)) if metric in record), None)
    return float(found) if found is not None and math.isfinite(found) else None


def _dimensions(composer: Composer, wanted: algorithms.Search) -> list[Dimension]:
    """What is searched over; the sweep is named by it."""
    composer.refuse_swept()
    dimensions = space.dimensions(composer.parser, composer.swept, wanted.space)
    taken = (*FIXED_KEYS, *compose.ONE_A_SWEEP, "hydra")
    if faults := [_fixed(each) for each in dimensions if each.key.split(".")[0] in taken]:
        raise ConfigError(*faults)
    composer.sweep_name = f"{wanted.kind}-{compose.named_by(each.key for each in dimensions)}"
    return dimensions


def _probes(composer: Composer, dimensions: list[Dimension]) -> list[list[str]]:
    """The overrides of every category and both ends of every range, each beside the first values of the others."""
    first = [f"{each.key}={each.extremes()[0]}" for each in dimensions]
    return [
        [*composer.fixed, *first[:place], f"{each.key}={value}", *first[place + 1 :]]
        for place, each in enumerate(dimensions)
        for value in each.extremes()
    ]


def _fixed(dimension: Dimension) -> Fault:
    return Fault(
        dimension.key, "cannot be searched over: it is the whole search's", "give it one value", dimension.text
    )


@contextlib.contextmanager
def _alone(sweep: SweepDir) -> Iterator[None]:
    """Be the only one that proposes runs of this sweep."""
    with files.writing(sweep.path):
        sweep.path.mkdir(parents=True, exist_ok=True)
        handle = sweep.search_lock.open("a")
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's it is not inherited by what is forked
        except OSError as error:
            remedy = f"python -m runner status {sweep.path} shows how far it is; sweep=NAME starts another"
            raise ResumeError(Fault("search", "another process is at it", remedy, sweep.path)) from error
        yield
