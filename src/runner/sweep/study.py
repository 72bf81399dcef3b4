"""Optuna's study of a search: what it is about, so that only runs which can be compared come together in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.config.bind import flatten
from runner.errors import Fault, ResumeError
from runner.secrets import redact_tree
from runner.tracking import manifest
from runner.tracking.sweepdir import SweepDir

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from runner.config.compose import Job
    from runner.sweep.algorithms import Search
    from runner.sweep.space import Dimension


def taken_up(wanted: Search, dimensions: Sequence[Dimension], fixed: dict[str, str], sweep: SweepDir) -> Study:
    """The sweep's study, new or as it was left.

    Raises:
        ResumeError: it was begun with another space, for other objectives, or with other runs.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(sweep.search_journal)))
    study = optuna.create_study(
        study_name="search", storage=storage, load_if_exists=True, directions=list(wanted.objectives.values()),
        pruner=optuna.pruners.NopPruner(),
    )  # fmt: skip
    about = {"space": {each.key: each.text for each in dimensions}, "objectives": wanted.objectives, "fixed": fixed}
    known = {**about, **study.user_attrs.get("about", {})}  # one that was begun before "fixed" was noted takes this
    for differs in ("space", "objectives"):
        if known[differs] != about[differs]:
            problem = f"this search has another {differs.rstrip('s')}: {_listed(known[differs])}"
            raise ResumeError(Fault("search", problem, "sweep=NAME starts a new one", _listed(about[differs])))
    if known["fixed"] != fixed:
        problem = f"its runs were begun with {_changes(known['fixed'], fixed)}: not to be compared with these"
        remedy = "sweep=NAME starts a new one; without these changes it goes on"
        raise ResumeError(Fault("search", problem, remedy, sweep.path.name))
    if study.user_attrs.get("about") != about:
        study.set_user_attr("about", about)
    study.sampler = wanted.sampler(len(study.get_trials(deepcopy=False)))
    return study


def fixed_for_all(probes: Sequence[Job]) -> dict[str, str]:
    """What all runs of the search compute with, by dotted keys: what its dimensions leave alone."""
    found = [dict(flatten(redact_tree(manifest.identity(probe.cfg)))) for probe in probes]
    return {key: value for key, value in found[0].items() if all(other.get(key) == value for other in found)}


def failures(study: Study) -> list[FrozenTrial]:
    """The trials that failed and whose parameters have not come to anything since."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    done = [params_of(trial) for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return [trial for trial in trials if trial.state == TrialState.FAIL and params_of(trial) not in done]


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial stands for; of one that waits to be proposed, too."""
    return dict(trial.params or trial.system_attrs.get("fixed_params") or {})


def _listed(pairs: Any) -> str:
    return ", ".join(f"{key}={text}" for key, text in pairs.items())


def _changes(then: dict[str, str], now: dict[str, str]) -> str:
    """``train.max_steps=60 (now 300), model.path=…``"""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return ", ".join(
        f"{key}={then[key]} (now {now[key]})" if key in then and key in now
        else f"{key}={then[key]} (now there is none)" if key in then
        else f"no {key} (now {now[key]})"
        for key in keys
    )  # fmt: skip
