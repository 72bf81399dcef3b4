"""The trials of a search: runs that Optuna proposes, and the results that are reported to it."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.errors import ConfigError
from runner.files import stamp
from runner.sweep import algorithms, folder, study
from runner.sweep.asha import Halving
from runner.sweep.session import Session
from runner.sweep.space import Dimension
from runner.tracking import manifest, metrics_log
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial, TrialState

POLL_EVERY_S = 0.1
"""Seconds between two checks for new evaluations of active runs (by file time): short, to waste few training steps."""


class Trials:
    """Source of a launcher (see launch/launcher.py): proposes runs with Optuna and reports their results to it."""

    def __init__(
        self, session: Session, settings: algorithms.Search, dimensions: list[Dimension], sweep: SweepDir,
        loaded: Study, *, retry: bool,
    ) -> None:  # fmt: skip
        self.session, self.settings, self.dimensions, self.sweep = session, settings, dimensions, sweep
        self.study = loaded
        self.live: dict[Path, list[Trial]] = {}
        """Folder of an active run → its trials: two proposals may be the same run."""
        self.halving = Halving(settings.rungs, sweep.rundirs()) if settings.rungs else None
        self.unfinished = deque(self._unfinished())
        if retry:
            self._enqueue_failed()
        self._polled_at = 0.0
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._ended_before = self._count_ended()

    @property
    def total(self) -> int:
        """Number of runs for this process: ``search.trials`` minus the runs that had ended before."""
        return max(0, self.settings.trials - self._ended_before)

    def next(self) -> RunDir | None:
        while not self.sweep.cancel_request.exists() and (self.unfinished or self._has_more()):
            trial = self.unfinished.popleft() if self.unfinished else self._ask()
            if (rundir := self._prepared(trial)) is None:
                continue
            is_active = rundir.path in self.live
            self.live.setdefault(rundir.path, []).append(trial)
            if is_active:
                continue
            rung = trial.user_attrs.get("promoted")  # differs from top() if an earlier process has resumed the run
            if self.halving and rundir.path in self.halving.paused and rung == self.halving.top(rundir):
                self.halving.resume(rundir)
            if folder.needs_worker(rundir, retry=bool(trial.user_attrs.get("is_retried"))):
                rundir.forget_cancel()
                if rundir.read_state().status == "failed":  # and is retried
                    rundir.forget_requests()
                return rundir
            self.ended(rundir)
        return None

    def ended(self, rundir: RunDir) -> None:
        """Report the result to Optuna. A stopped run is not reported: the same command resumes it."""
        from optuna.trial import TrialState

        self._report(rundir)
        if self.halving:
            self.halving.ended(rundir, rundir.read_state().status)
        state, trials = rundir.read_state(), self.live.pop(rundir.path, [])
        values = {metric: value_of(rundir, metric) for metric in self.settings.objectives}
        missing = [metric for metric, value in values.items() if value is None]
        if trials and state.status == "completed" and missing:
            names = " and ".join(missing)
            terminal.print_line(f"{rundir.path.name} is completed but counts as failed: it has not logged {names}")
        for trial in trials:
            if state.status == "completed" and not missing:
                self.study.tell(trial, [value for value in values.values() if value is not None])
            elif state.status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            elif state.status in ("completed", "failed"):
                self.study.tell(trial, state=TrialState.FAIL)

    def poll(self) -> None:
        """With ``search=asha``: read new evaluations and pause the runs that do not continue from their rung."""
        if self.halving is None or time.monotonic() - self._polled_at < POLL_EVERY_S:
            return
        self._polled_at = time.monotonic()
        for path in list(self.live):
            rundir = RunDir(path)
            if (latest := stamp(rundir.metrics)) != self._stamps.get(path):
                self._stamps[path] = latest
                self._report(rundir)
                passed = max(trial.user_attrs.get("passed", -1) for trial in self.live[path])
                if (rung := self.halving.top(rundir)) > passed and self.halving.continues(rundir):
                    for trial in self.live[path]:
                        trial.set_user_attr("passed", rung)

    def print_best(self) -> None:
        """Print the best run; with several objectives, the Pareto front."""
        from optuna.trial import TrialState

        has_completed = any(trial.state == TrialState.COMPLETE for trial in self._trials())
        states = self._last_states()
        counts = {state.name.lower(): states.count(state) for state in TrialState}
        terminal.print_line("search   " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
        for best in self.study.best_trials if has_completed else []:
            values = ", ".join(f"{m} {v:.6g}" for m, v in zip(self.settings.objectives, best.values, strict=True))
            terminal.print_line(f"best     {values}  {self._label(best.params)}  {best.user_attrs.get('folder', '')}")
        if failed := study.failures(self.study):
            labels = dict.fromkeys(self._label(study.params_of(trial)) for trial in failed)
            terminal.print_line(f"failed   {'; '.join(labels)}: retry with retry=true")

    def _ask(self) -> Trial:
        return self.study.ask({each.key: each.distribution() for each in self.dimensions})

    def _prepared(self, trial: Trial) -> RunDir | None:
        """Prepare the run of a trial; None if its configuration is refused, which fails the trial."""
        from optuna.trial import TrialState

        values = [each.override(trial.params[each.key]) for each in self.dimensions]
        try:
            jobs = self.session.composed([[*self.session.composer.fixed, *values]], trial.number)
        except ConfigError as error:
            terminal.print_line(f"trial {trial.number} is refused: {error}")
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        (entry,) = self.session.prepared(self.sweep, jobs, [self._label(trial.params)])
        if entry.rundir.path not in {known.rundir.path for known in self.session.entries}:
            self.session.entries.append(entry)
        trial.set_user_attr("folder", entry.rundir.path.name)
        return entry.rundir

    def _report(self, rundir: RunDir) -> None:
        """Report the run's evaluations to Optuna as intermediate values."""
        if self.halving is None:
            return
        values = self.halving.read(rundir)
        for trial in self.live.get(rundir.path, []):
            reported = self.study._storage.get_trial(trial._trial_id).intermediate_values
            for step in sorted(values.keys() - reported.keys()):
                trial.report(values[step], step)

    def _promote(self) -> bool:
        """Enqueue a paused run that is now among the best of its rung; False if there is none."""
        if self.halving is None:
            return False
        is_last = not self.live and not self._needs_new()
        if not (promotion := self.halving.promoted(is_last=is_last)):
            return False
        rundir, rung = promotion
        trial = next(trial for trial in self._trials() if trial.user_attrs.get("folder") == rundir.path.name)
        self.study.enqueue_trial(study.params_of(trial), user_attrs={"promoted": rung, "passed": rung})
        return True

    def _unfinished(self) -> Iterator[Trial]:
        """Trials that an earlier process proposed and whose results were not reported."""
        import optuna
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            yield optuna.trial.Trial(self.study, trial._trial_id)

    def _has_more(self) -> bool:
        """Whether a trial is enqueued, a paused run can be resumed, or a new run is needed."""
        from optuna.trial import TrialState

        is_waiting = any(trial.state == TrialState.WAITING for trial in self._trials())
        return is_waiting or self._promote() or self._needs_new()

    def _needs_new(self) -> bool:
        """Whether there are fewer than ``search.trials`` runs; a retried or resumed run counts once."""
        new = [trial for trial in self._trials() if not {"is_retried", "promoted"} & trial.user_attrs.keys()]
        return len(new) < self.settings.trials

    def _count_ended(self) -> int:
        """Number of runs that have ended and are not retried or resumed."""
        return sum(state.is_finished() for state in self._last_states())

    def _last_states(self) -> list[TrialState]:
        """For each run (each set of parameters), the state of its last trial."""
        last = {json.dumps(study.params_of(trial), sort_keys=True): trial.state for trial in self._trials()}
        return list(last.values())

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _enqueue_failed(self) -> None:
        """Enqueue the failed trials again, each once."""
        from optuna.trial import TrialState

        active = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING, TrialState.RUNNING])
        proposed = [study.params_of(trial) for trial in active]
        for params in map(study.params_of, study.failures(self.study)):
            if params not in proposed:
                self.study.enqueue_trial(params, user_attrs={"is_retried": True})
                proposed.append(params)

    def _label(self, values: dict[str, Any]) -> str:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        return ",".join(f"{key}={value}" for key, value in shown.items())


def value_of(rundir: RunDir, metric: str) -> float | None:
    """The value of a metric that ``compare`` shows for a run; None if it was not logged, or is NaN or infinite."""
    state = rundir.read_state()
    values, _ = metrics_log.of_run(state, metrics_log.read(rundir), manifest.read_config(rundir))
    value = values.get(metric, state.summary.get(metric))
    return float(value) if value is not None and math.isfinite(value) else None
