"""How a run really stands: what its folder says, held against the lock of its worker and against Slurm.

A folder cannot know that its worker was killed. Whoever asks finds out, and writes it down.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from runner.tracking import lookup
from runner.tracking.rundir import DIED, DONE, RunDir, State, Status
from runner.tracking.slurm_jobs import Queue
from runner.tracking.sweepdir import SweepDir, home_of, sweep_of

if TYPE_CHECKING:
    from runner.tracking.slurm_client import Job

LIVE = ("queued", "starting", "running", "stopping", "requeued")
"""What is going to go on without anybody's help."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_NODES = ("slurm", "mlflow")
"""Keys of the manifest that hold a dict, if anything."""
NOBODY = "nobody will start it: give the same command again"


@dataclass(frozen=True)
class RunStatus:
    """One run: its folder, and what is true of it now."""

    rundir: RunDir
    status: str
    """That of the state, or what no worker can write: one of LIVE, unknown, missing or damaged."""
    reason: str = ""
    state: State = field(default_factory=State)
    manifest: dict[str, Any] = field(default_factory=dict)
    job: Job | None = None
    """What Slurm says of it."""

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def label(self) -> str:
        """What it is called among its siblings, or by itself."""
        return str(self.manifest.get("label") or self.manifest.get("name") or self.rundir.path.name)


def of(rundirs: Sequence[RunDir]) -> list[RunStatus]:
    """How these runs stand; a state that is not true any more is corrected in the folder."""
    slurm = Queue()
    found = [_with_job(_read(rundir), slurm) for rundir in rundirs]
    jobs = slurm.jobs(_job_id(standing) for standing in found if _may_have_a_job(standing))
    around = _Around(silent=jobs is None)
    return [_settled(standing, (jobs or {}).get(_job_id(standing)), around) for standing in found]


def write(standing: RunStatus, status: str, reason: str) -> RunStatus:
    """Write down what its worker could not; nothing where a worker holds the folder or has said otherwise meanwhile."""
    rundir = standing.rundir
    try:
        with rundir.held() as mine:
            if mine and rundir.read_state() == standing.state:
                state = rundir.write_state(status=status, reason=reason)
                return replace(standing, status=status, reason=reason, state=state)
    except OSError as error:  # somebody else's folder: the truth is shown all the same
        lookup.log.warning(f"{rundir.path} says {standing.state.status} and that cannot be corrected: {error.strerror}")
        return replace(standing, status=status, reason=reason)
    return replace(standing, state=rundir.read_state())


def has_queue(sweep: SweepDir) -> bool | None:
    """Whether a process here works through the sweep; None if none ever did.

    The workers that a queue forked hold its lock as well, and may outlive it: they start no further run.
    """
    if not sweep.queue_lock.exists():
        return None
    if not sweep.is_worked_on():
        return False
    with_it = [files for _, files in _open_files() if _is_open(sweep.queue_lock, files)]
    own = RunDir(sweep.path).lock.name
    return not with_it or any(own not in map(os.path.basename, files) for files in with_it)


def holder(rundir: RunDir) -> int | None:
    """The pid of the process of this machine that holds the folder; None where there is none, or it is not mine.

    state.json may name a process that ended long ago, and whose number another has got since: so what counts is who has
    the lock open.
    """
    if not rundir.is_alive():
        return None
    likely = [rundir.read_state().pid]
    found = (pid for pids in (likely, None) for pid, files in _open_files(pids) if _is_open(rundir.lock, files))
    return next(found, None)


def supervisor(standing: RunStatus) -> int | None:
    """The pid of the process of this machine by which submitit runs it (launcher.cluster=local); None without one."""
    slurm = standing.manifest.get("slurm") or {}
    if slurm.get("cluster") != "local":
        return None
    import psutil

    with contextlib.suppress(psutil.Error, ValueError):
        pid = int(slurm["job_id"])
        return pid if any("submitit" in word for word in psutil.Process(pid).cmdline()) else None
    return None


def here() -> str:
    """This machine, as states name it."""
    return os.uname().nodename


@dataclass(frozen=True)
class _Around:
    """What several runs share."""

    silent: bool
    """Whether Slurm was asked and did not answer."""
    queues: dict[Path, bool | None] = field(default_factory=dict)
    """Folder of a sweep → what ``has_queue`` says."""


def _read(rundir: RunDir) -> RunStatus:
    if not rundir.path.is_dir():
        return RunStatus(rundir, "missing", "its folder is gone: it was refused, or removed")
    try:
        state, manifest = rundir.read_state(), rundir.read_manifest()
        if state.status not in get_args(Status) or not all(isinstance(manifest.get(k) or {}, dict) for k in _NODES):
            raise TypeError("not what a run writes")
    except lookup.DAMAGED as error:
        lookup.say_damaged(rundir.path, error)
        return RunStatus(rundir, "damaged", f"{type(error).__name__}: {error}")
    return RunStatus(rundir, state.status, state.reason, state, manifest)


def _with_job(standing: RunStatus, slurm: Queue) -> RunStatus:
    """The same with the job that a submitter died before noting: the worker wrote its own down, or Slurm knows it."""
    state = standing.state
    if standing.status not in ("pending", "running") or standing.manifest.get("slurm"):
        return standing
    job = state.scheduler_id if state.status == "running" and state.host not in ("", here()) else ""
    job = job or slurm.not_noted(home_of(standing.rundir)).get(str(standing.rundir.path), "")
    return replace(standing, manifest={**standing.manifest, "slurm": {"job_id": job}}) if job else standing


def _job_id(standing: RunStatus) -> str:
    slurm = standing.manifest.get("slurm") or {}
    is_real = slurm.get("cluster") not in ("local", "debug")  # of submitit: no Slurm knows those ids
    return str(slurm.get("job_id") or "") if is_real else ""


def _may_have_a_job(standing: RunStatus) -> bool:
    return standing.status in ("pending", "running", "preempted") or _is_submitted_since(standing) or _died(standing)


def _died(standing: RunStatus) -> bool:
    """Whether its mirror found the worker gone: why, and whether it is queued again, Slurm knows better."""
    return standing.state.status == "killed" and standing.state.reason == DIED


def _is_submitted_since(standing: RunStatus) -> bool:
    """Whether it was given to Slurm again after it had ended."""
    submitted = float((standing.manifest.get("slurm") or {}).get("submitted") or 0)
    return submitted > standing.state.updated and standing.status in ("failed", "killed")


def _settled(standing: RunStatus, job: Job | None, around: _Around) -> RunStatus:
    if standing.status in (*DONE, "missing", "damaged"):
        return standing
    is_alive = standing.rundir.is_alive()
    if job is not None and not (job.is_guess and standing.state.attempt):
        standing = replace(standing, job=job)
        status, reason = _with_slurm(standing, job, is_alive)
    else:
        status, reason = _with_lock(standing, is_alive, around)
    is_news = status != standing.state.status or (_died(standing) and reason != standing.state.reason)
    if is_news and status in ("killed", "failed"):
        return write(standing, status, reason)
    return replace(standing, status=status, reason=reason)


def _with_slurm(standing: RunStatus, job: Job, is_alive: bool) -> tuple[str, str]:
    """(status, reason) of a run that Slurm knows."""
    state = standing.state
    has_ended = state.status in ("killed", "failed") and not _is_submitted_since(standing) and not _died(standing)
    if has_ended:
        return state.status, state.reason
    if state.status == "running" and (is_alive or (job.is_active and job.state not in WAITING)):
        return "running", "suspended by Slurm" * (job.state == "SUSPENDED")
    if state.status == "preempted" and _is_ending(standing, job, is_alive):
        return "stopping", state.reason
    if is_alive:
        return "starting", ""
    if job.state in WAITING:
        return ("queued" if state.attempt == 0 else "requeued"), _waits(job)
    if job.is_active:
        return "starting", ""
    if state.status == "preempted" and job.state != "CANCELLED":
        return "preempted", state.reason
    # A worker at work says itself of what it fails; where it said nothing, it was killed.
    was_at_work = state.status == "running" or _died(standing)
    has_failed = job.state == "OUT_OF_MEMORY" or (job.state == "FAILED" and not was_at_work)
    return ("failed" if has_failed else "killed"), _fate(standing, job)


def _is_ending(standing: RunStatus, job: Job, is_alive: bool) -> bool:
    """Whether it was told to leave and has not left yet; whether it goes back into the queue shows only then."""
    return job.state == "COMPLETING" or (is_alive and holder(standing.rundir) == standing.state.pid)


def _waits(job: Job) -> str:
    return f"Slurm: {job.reason}" if job.reason else "waits in Slurm's queue"


def _fate(standing: RunStatus, job: Job) -> str:
    """How Slurm ended a run whose worker did not say so itself."""
    if job.state == "CANCELLED":
        return _request(standing) or "cancelled outside (scancel)"
    details = [
        job.reason if job.reason != job.state else "",
        f"exit code {job.exit_code}" if job.exit_code else "",
        f"signal {job.signal}" if job.signal else "",
        f"on {job.nodes}" if job.nodes else "",
        "before the run began" if not standing.state.attempt else "",
    ]
    return f"Slurm: {', '.join([job.state, *filter(None, details)])}"


def _request(standing: RunStatus) -> str:
    """What the person who cancelled it left in the folder; empty where nobody did."""
    request = standing.rundir.cancel_request
    return request.read_text().strip() if request.exists() else ""


def _with_lock(standing: RunStatus, is_alive: bool, around: _Around) -> tuple[str, str]:
    """(status, reason) of a run that only its lock tells of."""
    state = standing.state
    if is_alive:
        is_ending = state.status in ("killed", "failed", "preempted") and holder(standing.rundir) == state.pid
        return (state.status, state.reason) if is_ending or state.status == "running" else ("starting", "")
    if state.status == "running":
        if (around.silent and _job_id(standing)) or not (_job_id(standing) or state.host in ("", here())):
            return "unknown", f"its last sign came {_ago(state.updated)}; only {state.host} knows more"
        return "killed", _request(standing) or DIED
    if state.status == "pending":
        return _waiting(standing, around)
    return state.status, state.reason


def _waiting(standing: RunStatus, around: _Around) -> tuple[str, str]:
    sweep = sweep_of(standing.rundir)
    if _job_id(standing):
        knows = "does not answer" if around.silent else "does not know any more"
        return "unknown", f"it was given to Slurm as job {_job_id(standing)}, and Slurm {knows}"
    if supervisor(standing):
        return "starting", ""
    if sweep is None:
        return "pending", "nobody is at work on it"
    if sweep.path not in around.queues:
        around.queues[sweep.path] = has_queue(sweep)
    if around.queues[sweep.path]:
        return "queued", ""
    return "pending", NOBODY if around.queues[sweep.path] is False else "is being prepared, or nobody will start it"


def _open_files(pids: Iterable[int] | None = None) -> Iterator[tuple[int, list[str]]]:
    """(pid, files) of these processes, by default all of this machine, whose files I may see."""
    import psutil

    for pid in psutil.pids() if pids is None else pids:
        if pid and pid != os.getpid():
            with contextlib.suppress(psutil.Error, OSError):
                yield pid, [opened.path for opened in psutil.Process(pid).open_files()]


def _is_open(path: Path, files: Iterable[str]) -> bool:
    same_name = [file for file in files if os.path.basename(file) == path.name]
    return any(os.path.samefile(file, path) for file in same_name if os.path.exists(file))


def _ago(moment: float) -> str:
    seconds = max(0, int(time.time() - moment))
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
