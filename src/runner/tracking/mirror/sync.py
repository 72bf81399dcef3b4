"""Upload to MLflow what is missing there: run folders whose own upload process could not, and sweeps' parent runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import terminal
from runner.errors import ConfigError, Fault, RunnerError, TrackingError
from runner.secrets import take_credentials
from runner.tracking import lookup
from runner.tracking.metrics_log import read
from runner.tracking.mirror.follow import close_if_dead, only_one
from runner.tracking.mlflow import parent_run, rest, store
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.mlflow.run import MlflowRun, explained
from runner.tracking.rundir import RunDir, State, find_runs
from runner.tracking.sweepdir import SweepDir, sweep_of
from runner.tracking.trackers import check_mlflow

UNBEGUN, MIRRORED, ELSEWHERE = "it has not started", "its own mirror is at work on it", "it is in another store: "
"""Why there is nothing to bring, which is no fault."""
PROBE_S = 10.0


@dataclass(frozen=True)
class SyncResult:
    """What ``sync`` did for one run folder, or for the folder of a sweep: its parent."""

    folder: Path
    status: str
    unsent: int
    """Records of the folder that MLflow still lacks."""
    url: str | None
    problem: str
    """Why it is not all there; empty when it is."""


def sync(folders: Iterable[Path], uri: str | None = None, publish: Publish | None = None) -> list[SyncResult]:
    """Bring every run below ``folders`` into MLflow, with the parents of sweeps, and close what died.

    ``uri`` names another store than their configuration does; what is in another one than that is left as it is. A
    store that does not answer is asked once. ``publish`` writes the results of a sweep onto its parent.

    Raises:
        ConfigError: a folder without a run below it, or a URI that names no store.
        TrackingError: the store at ``uri`` does not answer; nothing was written then.
    """
    if uri:
        if faults := list(check_mlflow(uri=uri, experiment="runner", run_name=None)):
            raise ConfigError(*faults)
        uri = _credentials_into_environment(uri)
    runs = [rundir for folder in folders for rundir in find_runs(Path(folder))]
    sweeps = list(dict.fromkeys(filter(None, map(sweep_of, runs))))
    silent: dict[str, str] = {}
    kept: list[SyncResult] = []
    if uri:
        _refuse_silent(uri)
        elsewhere = {rundir.path: _elsewhere(rundir, uri) for rundir in runs}
        elsewhere |= {sweep.path: _elsewhere(sweep, uri) for sweep in sweeps}
        kept = [SyncResult(path, "", 0, None, ELSEWHERE + place) for path, place in elsewhere.items() if place]
        sweeps = [sweep for sweep in sweeps if not elsewhere[sweep.path]]
        # A run of a sweep that is in another store belongs below the parent it has there.
        runs = [run for run in runs if not elsewhere[run.path] and not elsewhere.get(run.path.parent)]
    problems = {sweep: parent_run.try_open(sweep, uri, offline=True, restore=False) for sweep in sweeps}
    results = [_sync(rundir, uri, silent) for rundir in runs]
    return [*kept, *results, *(_sync_parent(sweep, problems[sweep], publish) for sweep in sweeps)]


def _refuse_silent(uri: str) -> None:
    """Ask the store once, before anything is written that a store which is down would make untrue."""
    try:
        if store.is_server(uri):
            rest.ask(uri, "experiments/search", {"max_results": 1}, timeout_s=PROBE_S)
        else:
            store.connect(uri).search_experiments(max_results=1)
    except RunnerError:
        raise
    except Exception as error:  # a store fails in a hundred ways
        remedy = "check the address, and whether the server runs; nothing was changed"
        raise TrackingError(Fault("uri", explained(error, uri), remedy)) from error


def _elsewhere(what: RunDir | SweepDir, uri: str) -> str:
    """The other store that has the run, or the sweep or one of its runs; empty where none has, or it is gone."""
    try:
        said = what.read() if isinstance(what, SweepDir) else what.read_manifest()
        noted = str((said.get("mlflow") or {}).get("uri") or "")
    except lookup.DAMAGED:  # said in its place
        return ""
    place = noted if noted not in ("", uri) and store.is_there(noted) else ""
    runs = lookup.runs_of(what) if isinstance(what, SweepDir) and not place else []
    return place or next(filter(None, (_elsewhere(rundir, uri) for rundir in runs)), "")


def left_out(kept: Sequence[SyncResult]) -> list[Fault]:
    """What there is to say of runs and sweeps that are in another store already."""
    places: dict[str, list[Path]] = {}
    for result in kept:
        places.setdefault(result.problem.removeprefix(ELSEWHERE), []).append(result.folder)
    return [
        Fault(
            "uri",
            f"{terminal.nearest(folders[0])}{f' and {len(folders) - 1} more' if folders[1:] else ''} "
            f"{'are' if folders[1:] else 'is'} in {place} already, and a run is in one store",
            "leave uri out to bring that one up to date; compare, diff and ui read any store (uri=…)",
        )
        for place, folders in places.items()
    ]


def _sync_parent(sweep: SweepDir, problem: str, publish: Publish | None) -> SyncResult:
    """Say of the parent what its children, now told, make of it."""
    problem = problem or parent_run.update_parent(sweep, restore=False, publish=publish)
    noted = sweep.read().get("mlflow") or {}
    return SyncResult(sweep.path, "sweep", 0, noted.get("url"), problem)


def _sync(rundir: RunDir, uri: str | None, silent: dict[str, str]) -> SyncResult:
    """``silent``: store → what it answered with when it was last asked in vain."""
    with only_one(rundir.mirror_lock, wait=False) as mine:
        state = rundir.read_state()
        if not mine or state.status == "pending":
            return SyncResult(rundir.path, state.status, 0, None, UNBEGUN if mine else MIRRORED)
        try:
            run = MlflowRun.of(rundir, uri)
        except RunnerError as error:
            return SyncResult(rundir.path, state.status, 0, None, str(error))
        # Of a job that Slurm started only Slurm knows whether it is queued again: ``status`` asks it, and closes it.
        state = state if state.scheduler_id else close_if_dead(rundir)
        problem = silent.get(run.uri) or run.try_update()
        if problem and not store.answers(run.uri):
            silent[run.uri] = problem
        if not problem and state.status == "running" and not rundir.is_alive():
            problem = _unknown(state)
        if uri and problem:  # what its own store knows of it is as it was
            return SyncResult(rundir.path, state.status, max(0, len(read(rundir)) - run.sent), None, problem)
        unsent = run.report(problem)
        url = (rundir.read_manifest().get("mlflow") or {}).get("url")
        return SyncResult(rundir.path, state.status, unsent, url, problem)


def _unknown(state: State) -> str:
    if state.scheduler_id:
        return f"it says it runs as Slurm job {state.scheduler_id}: python -m runner status asks Slurm"
    return f"it says it runs on {state.host}: whether it does can only be seen there"


def _credentials_into_environment(uri: str) -> str:
    uri, user, password = take_credentials(uri)
    given = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    os.environ.update({name: value for name, value in given.items() if value})
    return uri
