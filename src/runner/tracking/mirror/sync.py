"""Complete uploads to MLflow: of runs whose own upload process failed, and of the parent runs of sweeps."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runner import terminal
from runner.errors import DamagedError, Fault, RunnerError, TrackingError, refuse
from runner.tracking import lookup, recovery
from runner.tracking.also.sending import Sending
from runner.tracking.lookup import find_runs
from runner.tracking.manifest import credentials_into_environment
from runner.tracking.metrics_log import read
from runner.tracking.mirror.backlog import UPLOADING, is_complete
from runner.tracking.mirror.follow import close_if_dead, only_one
from runner.tracking.mlflow import batch, parent_run, rest, store
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.mlflow.run import ENDED, MlflowRun
from runner.tracking.mlflow.upload import chunks
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir, home_of, sweep_of
from runner.tracking.trackers import check_mlflow

UNBEGUN, MIRRORED, ELSEWHERE = "not started yet", "its own upload process is running", "in another store: "
"""Reasons to upload nothing that are not errors."""
PROBE_S, PROGRESS_S = 10.0, 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class SyncResult:
    """Result of ``sync`` for one run, or for the parent run of a sweep."""

    folder: Path
    status: str
    unsent: int
    """Records of the folder that are not in MLflow yet."""
    url: str | None
    problem: str
    """Why the upload is incomplete; empty if it is complete."""


def sync(folders: Iterable[Path], uri: str | None = None, publish: Publish | None = None) -> list[SyncResult]:
    """Upload every run below ``folders`` to MLflow, with the parent runs of sweeps; mark dead runs as killed.

    ``uri`` replaces the store of the configurations; runs that are already in another store are skipped. A store that
    does not answer is contacted only once. ``publish`` writes the results of a sweep to its parent run.

    Raises:
        ConfigError: a folder without a run below it, or an invalid URI.
        TrackingError: the store at ``uri`` does not answer; nothing was changed.
    """
    if uri:
        refuse(check_mlflow(uri=uri, experiment="runner", run_name=None))
        uri = credentials_into_environment(uri)
    runs = [rundir for folder in folders for rundir in find_runs(Path(folder))]
    sweeps = list(dict.fromkeys(filter(None, map(sweep_of, runs))))
    silent: dict[str, str] = {}
    skipped: list[SyncResult] = []
    if uri:
        _refuse_silent(uri)
        stores = {run.path: _other_store(run, uri) for run in runs}
        stores |= {sweep.path: _other_store(sweep, uri) for sweep in sweeps}
        skipped = [SyncResult(path, "", 0, None, ELSEWHERE + other) for path, other in stores.items() if other]
        sweeps = [sweep for sweep in sweeps if not stores[sweep.path]]
        # If a sweep is in another store, its runs belong below its parent run there.
        runs = [run for run in runs if not stores[run.path] and not stores[home_of(run)]]
    problems = {sweep: parent_run.try_open(sweep, uri, offline=True, restore=False) for sweep in sweeps}
    shown, results = terminal.progress(UPLOADING, PROGRESS_S), list[SyncResult]()
    for rundirs in chunks(runs, batch.RUNS):
        results += _sync_many(rundirs, uri, silent)
        shown(len(results), len(runs))
    return [*skipped, *results, *(_sync_parent(sweep, problems[sweep], publish) for sweep in sweeps)]


def _refuse_silent(uri: str) -> None:
    """Check that the store answers before anything is written."""
    try:
        if store.is_server(uri):
            rest.ask(uri, "experiments/search", {"max_results": 1}, timeout_s=PROBE_S)
        else:
            store.connect(uri).search_experiments(max_results=1)
    except RunnerError:
        raise
    except Exception as error:  # MLflow stores raise many exception types
        remedy = "check the address and that the server is running; nothing was changed"
        raise TrackingError(Fault("uri", store.explained(error, uri), remedy)) from error


def _other_store(what: RunDir | SweepDir, uri: str) -> str:
    """URI of the other store that contains the run, the sweep or one of its runs; empty if none does or it is gone."""
    try:
        manifest = what.read() if isinstance(what, SweepDir) else what.read_manifest()
        recorded = str((manifest.get("mlflow") or {}).get("uri") or "")
    except lookup.DAMAGED:  # reported when the run is uploaded
        return ""
    if recorded not in ("", uri) and store.is_there(recorded):
        return recorded
    runs = lookup.runs_of(what) if isinstance(what, SweepDir) else []
    return next(filter(None, (_other_store(rundir, uri) for rundir in runs)), "")


def left_out(skipped: Sequence[SyncResult]) -> list[Fault]:
    """Warnings for runs and sweeps that were skipped because they are in another store."""
    stores: dict[str, list[Path]] = {}
    for result in skipped:
        stores.setdefault(result.problem.removeprefix(ELSEWHERE), []).append(result.folder)
    return [
        Fault(
            "uri",
            f"{terminal.nearest(folders[0])}{f' and {len(folders) - 1} more' if folders[1:] else ''} "
            f"{'are' if folders[1:] else 'is'} already in {other}, and a run can be in one store only",
            "omit uri to update that store; compare, diff and ui read any store (uri=…)",
        )
        for other, folders in stores.items()
    ]


def _sync_parent(sweep: SweepDir, problem: str, publish: Publish | None) -> SyncResult:
    """Update the parent run of a sweep after its children were uploaded."""
    try:
        problem = problem or parent_run.update_parent(sweep, restore=False, publish=publish)
        url = (sweep.read().get("mlflow") or {}).get("url")
    except DamagedError as error:
        problem, url = str(error), None
    return SyncResult(sweep.path, "sweep", 0, url, problem)


@dataclass
class _Begun:
    """A run whose upload lock is held."""

    run: MlflowRun
    state: State
    was_complete: bool


def _sync_many(rundirs: Sequence[RunDir], uri: str | None, silent: dict[str, str]) -> list[SyncResult]:
    """Upload some runs with few commits; a problem of a run, such as a damaged folder, is of this run only.

    ``silent``: URI of each store that does not answer → its error; extended here.
    """
    with contextlib.ExitStack() as locks:
        begun = [_tried(rundir, functools.partial(_begin, rundir, uri, locks)) for rundir in rundirs]
        known = [each.run for each in begun if isinstance(each, _Begun) and each.run.uri not in silent]
        if len(known) > 1:
            batch.update(known)
        return [
            _tried(each.run.rundir, functools.partial(_end, each, uri, silent)) if isinstance(each, _Begun) else each
            for each in begun
        ]


def _tried(rundir: RunDir, act: Callable[[], T]) -> T | SyncResult:
    """The value of ``act``; a result if the folder is damaged or belongs to another user."""
    try:
        return act()
    except DamagedError as error:
        return SyncResult(rundir.path, "damaged", 0, None, str(error))
    except OSError as error:
        problem = f"the folder cannot be written: {error.strerror}{_owner(rundir.path)}"
        return SyncResult(rundir.path, "", 0, None, problem)


def _owner(folder: Path) -> str:
    """Whose folder it is, if it belongs to another user."""
    with contextlib.suppress(OSError, KeyError):
        if folder.stat().st_uid != os.getuid():
            return f"; it belongs to {folder.owner()}, who can upload it"
    return ""


def _begin(rundir: RunDir, uri: str | None, locks: contextlib.ExitStack) -> _Begun | SyncResult:
    """Lock the run; a result if there is nothing to upload."""
    is_locked, state = locks.enter_context(only_one(rundir.mirror_lock, wait=False)), rundir.read_state()
    if not is_locked or (state.status == "pending" and not state.attempt):
        return SyncResult(rundir.path, state.status, 0, None, UNBEGUN if is_locked else MIRRORED)
    recovery.restore_manifest(rundir)
    try:
        run = MlflowRun.of(rundir, uri)
    except RunnerError as error:
        return SyncResult(rundir.path, state.status, 0, None, str(error))
    # Whether a Slurm job was requeued only Slurm can answer: ``status`` queries it and updates the state.
    state = state if state.scheduler_id else close_if_dead(rundir)
    run.also = dict.fromkeys(run.tracking.also, "")
    return _Begun(run, state, is_complete(rundir))


def _end(begun: _Begun, uri: str | None, silent: dict[str, str]) -> SyncResult:
    """Upload what is missing yet, and say what could not be uploaded."""
    run, state, rundir = begun.run, begun.state, begun.run.rundir
    problem = silent.get(run.uri) or run.try_update(closes_doubles=True)
    if problem and not store.answers(run.uri):
        silent[run.uri] = problem
    if not problem and state.status == "running" and not rundir.is_alive():
        problem = _unverified(state)
    if uri and problem:  # mirror.json describes the run's own store, which was not touched
        return SyncResult(rundir.path, state.status, max(0, len(read(rundir)) - run.sent), None, problem)
    if state.status in ENDED and not begun.was_complete:
        Sending(rundir, run.tracking, run.config, run.also).send(state)
    unsent = run.report(problem)
    problem = problem or "; ".join(f"{name}: {text}" for name, text in run.also.items() if text)
    url = (rundir.read_manifest().get("mlflow") or {}).get("url")
    return SyncResult(rundir.path, state.status, unsent, url, problem)


def _unverified(state: State) -> str:
    if state.scheduler_id:
        return f"state.json: running as Slurm job {state.scheduler_id}; to check this: python -m runner status"
    return f"state.json: running on {state.host}; this can be checked only on that machine"
