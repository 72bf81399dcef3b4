"""Current status of runs: state.json, corrected by the worker lock and by Slurm.

A worker that is killed cannot update state.json; the next status query detects this and corrects the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from runner.errors import DamagedError
from runner.files import is_held, stamp
from runner.tracking import lock_holders, lookup, naming, slurm_jobs
from runner.tracking.rundir import RunDir
from runner.tracking.slurm_client import JobRef
from runner.tracking.slurm_jobs import NO_JOB, Queue
from runner.tracking.state_file import DIED, DONE, State, Status
from runner.tracking.sweepdir import SweepDir, home_of, sweep_of

if TYPE_CHECKING:
    from runner.tracking.slurm_client import Job

LIVE = ("queued", "starting", "running", "stopping", "requeued")
"""Statuses of runs that proceed without a command of the user."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_NODES = ("slurm", "mlflow")
"""Optional keys of the manifest whose value is a dict."""
NOBODY = "no process will start this run: repeat the command"
PREPARING_S = 120.0
"""Longest time between the folders of a sweep and its local queue, or its submission to Slurm."""


@dataclass(frozen=True)
class RunStatus:
    """Current status of one run."""

    rundir: RunDir
    status: str
    """The status in state.json, or one that no worker writes: one of LIVE, unknown, missing or damaged."""
    reason: str = ""
    state: State = field(default_factory=State)
    manifest: dict[str, Any] = field(default_factory=dict)
    job: Job | None = None
    """Its Slurm job, if Slurm lists one."""

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def label(self) -> str:
        return naming.label(self.manifest, self.rundir.path)


def of(rundirs: Sequence[RunDir]) -> list[RunStatus]:
    """The current status of these runs; an outdated state.json is corrected."""
    slurm = Queue()
    runs = [_with_job_id(_read(rundir), slurm) for rundir in rundirs]
    jobs = slurm.jobs(slurm_jobs.ref(run.manifest) for run in runs if _may_have_a_job(run))
    context = _Context(slurm_is_silent=jobs is None)
    return [_resolve(run, (jobs or {}).get(slurm_jobs.ref(run.manifest)), context) for run in runs]


def write(run: RunStatus, status: str, reason: str) -> RunStatus:
    """Correct state.json; no change if a worker holds the folder or the file has changed since it was read."""
    rundir = run.rundir
    try:
        with rundir.held() as is_held:
            if is_held and rundir.read_state() == run.state:
                state = rundir.write_state(status=status, reason=reason)
                return replace(run, status=status, reason=reason, state=state)
    except OSError as error:  # not writable: the correct status is shown nevertheless
        lookup.log.warning(
            f"{rundir.path}: state.json is outdated (status {run.state.status}) and cannot be written: {error.strerror}"
        )
        return replace(run, status=status, reason=reason)
    return replace(run, state=rundir.read_state())


def supervisor(run: RunStatus) -> int | None:
    """Pid of the local submitit process that supervises the run (launcher.cluster=local); None if there is none."""
    return slurm_jobs.supervisor(run.rundir, run.manifest)


def here() -> str:
    """Host name of this machine, as written to state.json."""
    return os.uname().nodename


@dataclass(frozen=True)
class _Context:
    """Facts shared by all runs of one status query."""

    slurm_is_silent: bool
    """Slurm was called and did not answer."""
    queues: dict[Path, bool | None] = field(default_factory=dict)
    """Sweep folder → result of ``lock_holders.has_queue``."""


def _read(rundir: RunDir) -> RunStatus:
    if not rundir.path.is_dir():
        return RunStatus(rundir, "missing", "its folder does not exist: the run was refused, or the folder removed")
    try:
        state, manifest = rundir.read_state(), rundir.read_manifest()
        if state.status not in get_args(Status) or not all(isinstance(manifest.get(k) or {}, dict) for k in _NODES):
            raise TypeError("unexpected contents of state.json or manifest.json")
    except lookup.DAMAGED as error:
        reason = (
            "; ".join((f"{fault.problem}: {fault.remedy}") for fault in error.faults)
            if isinstance(error, DamagedError)
            else f"{type(error).__name__}: {error}"
        )
        return RunStatus(rundir, "damaged", reason)
    return RunStatus(rundir, state.status, state.reason, state, manifest)


def _with_job_id(run: RunStatus, slurm: Queue) -> RunStatus:
    """Add the job id if the submitter died before it recorded the id: taken from the worker's state, or from Slurm."""
    state = run.state
    if run.status not in ("pending", "running") or run.manifest.get("slurm"):
        return run
    job = NO_JOB
    if state.status == "running" and state.scheduler_id and state.host not in ("", here()):
        job = JobRef(state.scheduler_id, str(run.manifest.get("scheduler_name") or ""))
    if job == NO_JOB:
        job = slurm.unrecorded_jobs(home_of(run.rundir)).get(str(run.rundir.path), NO_JOB)
    return replace(run, manifest={**run.manifest, "slurm": {"job_id": job.id, "name": job.name}}) if job.id else run


def _job_id(run: RunStatus) -> str:
    return slurm_jobs.ref(run.manifest).id


def _may_have_a_job(run: RunStatus) -> bool:
    return run.status in ("pending", "running", "preempted") or _is_submitted_since(run) or _died(run)


def _died(run: RunStatus) -> bool:
    """Whether a local process found the worker killed; only Slurm has the cause, and whether the job was requeued."""
    return run.state.status == "killed" and run.state.reason == DIED


def _is_submitted_since(run: RunStatus) -> bool:
    """Whether the run was submitted to Slurm again after it had ended."""
    submitted = float((run.manifest.get("slurm") or {}).get("submitted") or 0)
    return submitted > run.state.updated and run.status in ("failed", "killed")


def _resolve(run: RunStatus, job: Job | None, context: _Context) -> RunStatus:
    if run.status == "damaged" and run.rundir.is_alive():  # it can be followed and cancelled
        return replace(run, status="running")
    if run.status in (*DONE, "missing", "damaged"):
        return run
    is_alive = run.rundir.is_alive()
    if job is not None and not (job.is_guess and run.state.attempt):
        run = replace(run, job=job)
        status, reason = _by_slurm(run, job, is_alive)
    else:
        status, reason = _by_lock(run, is_alive, context)
    is_outdated = status != run.state.status or (_died(run) and reason != run.state.reason)
    if is_outdated and status in ("killed", "failed"):
        return write(run, status, reason)
    return replace(run, status=status, reason=reason)


def _by_slurm(run: RunStatus, job: Job, is_alive: bool) -> tuple[str, str]:
    """(status, reason) of a run whose job Slurm lists."""
    state = run.state
    has_ended = state.status in ("killed", "failed") and not _is_submitted_since(run) and not _died(run)
    if has_ended:
        return state.status, state.reason
    if state.status == "running" and (is_alive or (job.is_active and job.state not in WAITING)):
        return "running", "suspended by Slurm" * (job.state == "SUSPENDED")
    if state.status == "preempted" and _is_ending(run, job, is_alive):
        return "stopping", state.reason
    if is_alive:
        return "starting", ""
    if job.state in WAITING:
        return ("queued" if state.attempt == 0 else "requeued"), _pending_reason(job)
    if job.is_active:
        return "starting", ""
    if state.status == "preempted" and job.state != "CANCELLED":
        return "preempted", state.reason
    # A worker that fails records the error itself; a worker without a record was killed.
    had_started = state.status == "running" or _died(run)
    has_failed = job.state == "OUT_OF_MEMORY" or (job.state == "FAILED" and not had_started)
    return ("failed" if has_failed else "killed"), _slurm_reason(run, job)


def _is_ending(run: RunStatus, job: Job, is_alive: bool) -> bool:
    """Whether the job received the stop signal and has not ended yet; a requeue is visible only after the end."""
    return job.state == "COMPLETING" or (is_alive and lock_holders.holder(run.rundir) == run.state.pid)


def _pending_reason(job: Job) -> str:
    return f"Slurm: {job.reason}" if job.reason else "pending in Slurm"


def _slurm_reason(run: RunStatus, job: Job) -> str:
    """Why the job ended, from Slurm, for a worker that recorded no reason."""
    if job.state == "CANCELLED":
        return _cancel_reason(run) or "cancelled with scancel"
    details = [
        job.reason if job.reason != job.state else "",
        f"exit code {job.exit_code}" if job.exit_code else "",
        f"signal {job.signal}" if job.signal else "",
        f"on {job.nodes}" if job.nodes else "",
        "before the run started" if not run.state.attempt else "",
    ]
    return f"Slurm: {', '.join([job.state, *filter(None, details)])}"


def _cancel_reason(run: RunStatus) -> str:
    """Contents of the cancel request; empty if there is none."""
    request = run.rundir.cancel_request
    return request.read_text().strip() if request.exists() else ""


def _by_lock(run: RunStatus, is_alive: bool, context: _Context) -> tuple[str, str]:
    """(status, reason) of a run without a job in Slurm, from its worker lock."""
    state = run.state
    if is_alive:
        is_ending = state.status in ("killed", "failed", "preempted") and lock_holders.holder(run.rundir) == state.pid
        return (state.status, state.reason) if is_ending or state.status == "running" else ("starting", "")
    if state.status == "running":
        if (context.slurm_is_silent and _job_id(run)) or not (_job_id(run) or state.host in ("", here())):
            return "unknown", f"last update {_ago(state.updated)}; check on {state.host}"
        return "killed", _cancel_reason(run) or DIED
    if state.status == "pending":
        return _by_queue(run, context)
    return state.status, state.reason


def _by_queue(run: RunStatus, context: _Context) -> tuple[str, str]:
    """(status, reason) of a pending run without a worker: whether some process will start it."""
    sweep = sweep_of(run.rundir)
    if _job_id(run):
        problem = "does not answer" if context.slurm_is_silent else "no longer lists this job"
        return "unknown", f"submitted as Slurm job {_job_id(run)}; Slurm {problem}"
    if supervisor(run):
        return "starting", ""
    if sweep is None:
        return "pending", "no process is running it"
    if sweep.path not in context.queues:
        context.queues[sweep.path] = lock_holders.has_queue(sweep)
    if context.queues[sweep.path]:
        return "queued", ""
    had_queue = context.queues[sweep.path] is False
    return "pending", NOBODY if had_queue or not _is_being_prepared(sweep) else "being prepared"


def _is_being_prepared(sweep: SweepDir) -> bool:
    """Whether a command may be creating its runs; one that died before its queue began leaves no other trace."""
    changed = stamp(sweep.manifest)[1:2]
    return is_held(sweep.lock) or any(time.time() - ns / 1e9 < PREPARING_S for ns in changed)


def _ago(moment: float) -> str:
    seconds = max(0, int(time.time() - moment))
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
