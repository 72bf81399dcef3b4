"""Optuna's study of a search. It records the space and the fixed settings, so that all its runs are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.config import moved
from runner.config.bind import flatten
from runner.errors import Fault, ResumeError
from runner.secrets import redact_tree
from runner.tracking import manifest
from runner.tracking.sweepdir import SweepDir

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from runner.config.job import Job
    from runner.sweep.algorithms import Search
    from runner.sweep.space import Dimension


def load_or_create(search: Search, dimensions: Sequence[Dimension], fixed: dict[str, str], sweep: SweepDir) -> Study:
    """Load the sweep's study, or create it.

    Raises:
        ResumeError: the existing study has another space, other objectives, or runs with other fixed settings.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(sweep.search_journal)))
    study = optuna.create_study(
        study_name="search", storage=storage, load_if_exists=True, directions=list(search.objectives.values()),
        pruner=optuna.pruners.NopPruner(),
    )  # fmt: skip
    about = {"space": {each.key: each.text for each in dimensions}, "objectives": search.objectives, "fixed": fixed}
    known = {**about, **study.user_attrs.get("about", {})}  # studies of older versions do not contain "fixed"
    for differs in ("space", "objectives"):
        if known[differs] != about[differs]:
            what = "another space" if differs == "space" else "other objectives"
            problem = f"the existing search has {what}: {_listed(known[differs])}"
            raise ResumeError(Fault("search", problem, "start a new search with sweep=NAME", _listed(about[differs])))
    if known["fixed"] != fixed:
        problem = f"the existing runs of this search are not comparable: {_changes(known['fixed'], fixed)}"
        remedy = "undo these changes to continue the search, or start a new one with sweep=NAME"
        raise ResumeError(Fault("search", problem, remedy, sweep.path.name))
    if study.user_attrs.get("about") != about:
        study.set_user_attr("about", about)
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)))
    return study


def fixed_for_all(probes: Sequence[Job]) -> dict[str, str]:
    """Settings that all runs of the search share, by dotted keys: everything that no dimension changes."""
    configs = [dict(flatten(redact_tree(manifest.identity(probe.cfg)))) for probe in probes]
    return {key: value for key, value in configs[0].items() if all(other.get(key) == value for other in configs)}


def failures(study: Study) -> list[FrozenTrial]:
    """Failed trials whose parameters have not been completed or pruned in another trial."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    done = [params_of(trial) for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return [trial for trial in trials if trial.state == TrialState.FAIL and params_of(trial) not in done]


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """Parameters of a trial, also of one that is still enqueued."""
    return dict(trial.params or trial.system_attrs.get("fixed_params") or {})


def _listed(pairs: Any) -> str:
    return ", ".join(f"{key}={text}" for key, text in pairs.items())


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """``train.max_steps=60 (now 300), model.path=…``"""
    before, now = ({key: moved.target_today(text) for key, text in keys.items()} for keys in (before, now))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(
        f"{key}={before[key]} (now {now.get(key, 'not set')})" if key in before else f"{key} not set (now {now[key]})"
        for key in keys
    )
