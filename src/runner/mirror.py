"""Mirrors a run folder into MLflow: the process beside a worker, and ``sync`` for what it could not bring.

The folder is the truth. Whatever stops this process, the next one looks at what MLflow has and sends the rest. It
outlives its worker, so that a run which was killed is said to be killed, in the folder and in MLflow.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner import store
from runner.errors import ConfigError, Fault, RunnerError
from runner.mlflow_run import ENDED, MlflowRun
from runner.rundir import DIED, RunDir, State, find_runs
from runner.secrets import redact, take_credentials
from runner.system import Sampler
from runner.tracking import append_to, check_mlflow, tail

POLL_S = 0.2
BATCH_S = 2.0
"""Between two batches while the run goes on: MLflow's pages are two seconds behind, at 1 % of a core."""
GRACE_S = 15.0
"""How long after the end of the run a store that does not answer is asked again."""
LONGEST_PAUSE_S = 10.0
GAVE_UP = 3

SYNC_HELP = """python -m runner sync [FOLDER …] [uri=URI]

Brings into MLflow what it has not got yet of the runs in FOLDER (a run folder, or a folder of them; by default
outputs), and closes runs whose process died. Runs of tracking=offline go to the embedded database, or to URI."""


@dataclass(frozen=True)
class SyncResult:
    """What ``sync`` did for one run folder."""

    folder: Path
    status: str
    unsent: int
    """Records of the folder that MLflow still lacks."""
    url: str | None
    problem: str
    """Why it is not all there; empty when it is."""


def sync_command(argv: list[str]) -> int:
    """The verb ``sync``; returns the exit code, 1 where something could not be brought.

    Raises:
        ConfigError: a word that is neither a folder nor ``uri=…``.
    """
    if {"-h", "--help"} & set(argv):
        print(SYNC_HELP)
        return 0
    uris = [word.partition("=")[2] for word in argv if word.startswith(("uri=", "tracking.uri="))]
    folders = [word for word in argv if not word.startswith(("uri=", "tracking.uri="))]
    if unknown := [word for word in folders if word.startswith("-") or ("=" in word and not os.path.exists(word))]:
        raise ConfigError(*(Fault(word, "sync does not know this word", SYNC_HELP.splitlines()[0]) for word in unknown))
    results = sync(map(Path, folders or ["outputs"]), uris[-1] if uris else None)
    for result in results:
        print(f"{result.folder}  {result.status}  {result.problem or result.url or 'is in MLflow'}")
    return int(any(result.problem for result in results if result.status != "pending"))


def sync(folders: Iterable[Path], uri: str | None = None) -> list[SyncResult]:
    """Bring every run below ``folders`` into MLflow, and close those whose process died.

    ``uri`` names another store than their configuration does. A store that does not answer is asked once.

    Raises:
        ConfigError: a folder without a run below it, or a URI that names no store.
    """
    if uri:
        if faults := list(check_mlflow(uri=uri, experiment="runner", run_name=None)):
            raise ConfigError(*faults)
        uri = _credentials_into_environment(uri)
    runs = [rundir for folder in folders for rundir in find_runs(Path(folder))]
    silent: dict[str, str] = {}
    return [_sync(rundir, uri, silent) for rundir in runs]


def follow(rundir: RunDir, since: float = 0.0) -> int:
    """Mirror the folder until MLflow knows how the run ended.

    ``since`` is the time stamp of the state that the folder had before this attempt of the run.

    Returns:
        the exit code: 0 all is told or there is nothing to tell, 3 the store did not answer to the end.
    """
    with _only_one(rundir, wait=True) as mine:
        if not mine or not _has_begun(rundir, since):
            return 0
        run = MlflowRun.of(rundir)
        run.packages = _installed()
        return _until_told(run)


def close_if_dead(rundir: RunDir) -> State:
    """Say ``killed`` of a run whose process is gone while its state says ``running``; returns the state."""
    state = rundir.read_state()
    if state.status == "running" and not rundir.is_alive():
        with rundir.held() as mine:
            if mine and rundir.read_state().status == "running":
                state = rundir.write_state(status="killed", reason=DIED)
    return state


def _has_begun(rundir: RunDir, since: float) -> bool:
    """Wait until the worker has begun to train; False if it never does: it was refused, there is nothing to tell."""
    import mlflow  # noqa: F401 - seconds of import, spent while the worker imports its own

    while rundir.path.exists():
        state = rundir.read_state()
        if state.status == "running" or (state.status in ENDED and state.updated != since):
            return True
        if not rundir.is_alive():
            return state.status in ENDED
        time.sleep(POLL_S)
    return False


def _until_told(run: MlflowRun) -> int:
    rundir, samples = run.rundir, _samples(run)
    due, failures, problem, give_up_at = 0.0, 0, "", float("inf")
    while rundir.state.exists():
        ended = close_if_dead(rundir).status in ENDED
        now = time.monotonic()
        if not ended:
            give_up_at = float("inf")
            next(samples)
        elif give_up_at == float("inf"):
            due, give_up_at = 0.0, now + GRACE_S
        if now >= due:
            before, problem = problem, run.try_update()
            failures = failures + 1 if problem else 0
            if problem != before:
                _say(problem or "the store answers again")
                run.report(problem)
            if ended and not problem:
                _say(f"all {run.sent} records are in MLflow")
                run.report("")
                return 0
            pause = min(2.0**failures, LONGEST_PAUSE_S) if problem else BATCH_S
            due = time.monotonic() + (min(pause, 1.0) if ended else pause)
        if time.monotonic() > give_up_at:
            _say(f"gave up: {run.report(problem)} records are not in MLflow")
            return GAVE_UP
        time.sleep(POLL_S)
    return 0


def _samples(run: MlflowRun) -> Iterator[None]:
    """Each ``next`` appends a sample of the machine to system.jsonl if one is due."""
    if not run.tracking.system_metrics:
        while True:
            yield
    rundir, sampler = run.rundir, Sampler(run.rundir.path)
    step = max((record["step"] for record in tail(rundir.system, 0)[0]), default=-1) + 1
    due = time.monotonic()
    while True:
        if time.monotonic() >= due:
            due = time.monotonic() + run.tracking.system_interval_s
            with contextlib.suppress(OSError):  # a full disk: the samples are the least of it
                append_to(rundir.system, {"step": step, "time": time.time(), **sampler.sample(rundir.read_state().pid)})
                step += 1
        yield


def _sync(rundir: RunDir, uri: str | None, silent: dict[str, str]) -> SyncResult:
    """``silent``: store → what it answered with when it was last asked in vain."""
    with _only_one(rundir, wait=False) as mine:
        state = rundir.read_state()
        here = state.host in ("", os.uname().nodename)
        if not mine or state.status == "pending":
            why = "it has not started" if mine else "its own mirror is at work on it"
            return SyncResult(rundir.path, state.status, 0, None, why)
        try:
            run = MlflowRun.of(rundir, uri)
        except RunnerError as error:
            return SyncResult(rundir.path, state.status, 0, None, str(error))
        state = close_if_dead(rundir) if here else state
        problem = silent.get(run.uri) or run.try_update()
        if problem and not store.answers(run.uri):
            silent[run.uri] = problem
        if not problem and state.status == "running" and not here:
            problem = f"it says it runs on {state.host}: whether it does can only be seen there"
        unsent = run.report(problem)
        url = (rundir.read_manifest().get("mlflow") or {}).get("url")
        return SyncResult(rundir.path, state.status, unsent, url, problem)


@contextlib.contextmanager
def _only_one(rundir: RunDir, wait: bool) -> Iterator[bool]:
    """Be the only mirror of this folder; yields False where another is, or where the folder is gone."""
    try:
        handle = rundir.mirror_lock.open("a")
    except FileNotFoundError:
        yield False
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _credentials_into_environment(uri: str) -> str:
    uri, user, password = take_credentials(uri)
    given = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    os.environ.update({name: value for name, value in given.items() if value})
    return uri


def _installed() -> dict[str, str]:
    found = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return dict(sorted(found.items(), key=lambda item: str(item[0]).lower()))


def _say(text: str) -> None:
    print(time.strftime("%F %T"), redact(text), flush=True)


def main(folder: str, since: str = "0") -> int:
    """``python -m runner.mirror FOLDER [SINCE]``: polite to the worker, and deaf to what is meant for it."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # it ends by itself soon after its worker, once the end is told
    with contextlib.suppress(OSError):
        os.nice(10)
    rundir = RunDir(Path(folder))
    try:
        return follow(rundir, float(since))
    except FileNotFoundError:
        if rundir.path.exists():
            raise
        return 0  # refused before it began, and tidied away


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
