"""Query and control Slurm jobs with its commands ``squeue``, ``sacct``, ``scontrol``, ``scancel`` and ``sinfo``.

A job id is ``123``, or ``123_4`` for task 4 of a job array. Slurm uses ids again (another cluster, a counter that was
reset), so a job is identified by its id and its random name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from runner.errors import LaunchError
from runner.tracking import slurm_commands

Fate = Literal["running", "requeued", "time limit", "cancelled", "ended"]

ACTIVE = (
    "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
)  # fmt: skip
"""States of a job that is pending, runs, or is about to leave its nodes; all other states are final."""

ON_ITS_WAY = ("REQUEUED", "PREEMPTED", "NODE_FAIL")
"""States in sacct after which the job may start again; squeue does not list such a job for a short time."""


class JobRef(NamedTuple):
    """Identity of a job."""

    id: str
    name: str


@dataclass(frozen=True)
class Job:
    """Current state of one job, or of one task of a job array, in Slurm."""

    id: str
    state: str
    """Slurm's state in capitals, first word only (``CANCELLED by 0`` is ``CANCELLED``)."""
    reason: str = ""
    """Why the job is pending, or why it failed; empty if Slurm has no reason."""
    nodes: str = ""
    exit_code: int | None = None
    """Exit code of the job script; None while it runs, or if sacct has none."""
    signal: int = 0
    """The signal that ended the job; 0 if none did."""
    is_guess: bool = False
    """True if Slurm lists the array without this task: cancelled while pending, or purged after it had run."""
    name: str = ""

    @property
    def ref(self) -> JobRef:
        return JobRef(self.id, self.name)

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def jobs(refs: Iterable[JobRef]) -> dict[JobRef, Job]:
    """The jobs that Slurm lists with both id and name: one call of squeue, and one of sacct if squeue is not enough.

    For pending and running jobs squeue has priority: sacct reports NODE_FAIL for a while after a job was requeued
    because its node died. Without accounting, ended jobs are found only as long as squeue lists them (MinJobAge).

    Raises:
        LaunchError: squeue is missing, or the controller does not answer.
    """
    refs = sorted({ref for ref in refs if ref.id and ref.name})
    if not refs:
        return {}
    squeue = _squeue(refs)
    queued = {ref: squeue[ref] for ref in refs if ref in squeue}
    sacct = _sacct([ref for ref in refs if ref not in queued or not queued[ref].is_active])
    ended = {ref: sacct[ref] for ref in refs if ref in sacct and (not sacct[ref].is_active or ref not in queued)}
    if restarting := [ref for ref, job in ended.items() if job.state in ON_ITS_WAY]:
        ended.update({ref: job for ref, job in _squeue(restarting).items() if ref in restarting and job.is_active})
    ended = {ref: completed_by(job, queued[ref]) if ref in queued else job for ref, job in ended.items()}
    return {**_unlisted_tasks(refs, [*squeue, *sacct]), **queued, **ended}


def completed_by(accounting: Job, controller: Job) -> Job:
    """An ended job with the reason that only the controller knows: accounting's record may not be complete yet."""
    if accounting.reason or controller.state != accounting.state:
        return accounting
    return replace(accounting, reason=controller.reason)


def named(name: str) -> list[str]:
    """Ids of the jobs with this name, each once; for a job array the id of the array, not of its tasks."""
    lines = slurm_commands.lines(["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%F"])
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", f"--name={name}", "--starttime=now-30days"]
    lines = lines or slurm_commands.lines([*sacct, "--format=JobID"], or_none=True)
    return sorted({line.partition("_")[0] for line in lines})


def output_folder(id: str) -> Path | None:
    """The folder of the output of a job of any program, from the controller or accounting; None if neither knows it."""
    if slurm_commands.silence():
        return None
    shown = "".join(slurm_commands.lines(["scontrol", "--oneliner", "show", "job", id], or_none=True))
    if found := re.search(r"\bStdOut=(.+?)(?= \w+=|$)", shown):
        return Path(found[1]).parent
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={id}", "--format=SubmitLine"]
    for line in slurm_commands.lines(sacct, or_none=True):
        with contextlib.suppress(ValueError):  # a quotation mark that is not closed
            return Path(shlex.split(line)[-1]).parent  # submitit's script is beside the output
    return None


def fate(id: str, restarts: int) -> Fate:
    """What happens to this process's own job after a stop signal.

    ``time limit``: Slurm ends the job since its time is over; it can still be requeued.

    Args:
        restarts: number of requeues before this start (``SLURM_RESTART_COUNT``).

    Raises:
        LaunchError: the controller does not answer.
    """
    (line, *_) = [*slurm_commands.lines(["scontrol", "--oneliner", "show", "job", id]), ""]
    facts = dict(re.findall(r"\b(JobState|Reason|Restarts|ExitCode)=(\S+)", line))
    state = facts.get("JobState", "")
    if state in ("RUNNING", "SIGNALING", "STOPPED", "SUSPENDED"):
        return "running"
    if int(facts.get("Restarts", 0)) > restarts or state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        return "requeued"
    if state in ("COMPLETING", "TIMEOUT") and facts.get("Reason") == "TimeLimit":
        return "time limit"
    # COMPLETING does not show the cause: sacct has it, else the signal (Slurm sends one only to a cancelled job).
    job = next((job for ref, job in _sacct([JobRef(id, "")]).items() if ref.id == id), None)
    if job is None:
        return "cancelled" if state == "CANCELLED" or facts.get("ExitCode") == "0:15" else "ended"
    if job.state in ON_ITS_WAY:
        return "requeued"
    return "cancelled" if job.state == "CANCELLED" else "ended"


def seconds_left(id: str) -> float:
    """Seconds until the job's time limit; infinite if there is no limit, or Slurm reports none.

    Raises:
        LaunchError: the controller does not answer.
    """
    (remaining, *_) = [*slurm_commands.lines(["squeue", "--noheader", "--format=%L", f"--jobs={id}"]), ""]
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", remaining.strip())
    if not match:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def own_id() -> str:
    """Slurm job id of this process, as Slurm's commands write it; empty outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def own_ref() -> JobRef:
    """The Slurm job of this process; without id and name outside of a job."""
    return JobRef(own_id(), os.environ.get("SLURM_JOB_NAME", ""))


def own_restarts() -> int:
    """Number of requeues of that job before this process started."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def is_cancelled() -> bool:
    """Whether the job of this process is being cancelled; False if Slurm does not answer."""
    try:
        return bool(own_id()) and fate(own_id(), own_restarts()) == "cancelled"
    except LaunchError:
        return False


def requeue(id: str) -> None:
    """Requeue a running job; Slurm ends its processes.

    Raises:
        LaunchError: with Slurm's reason, for example if the job or the cluster does not allow a requeue.
    """
    slurm_commands.lines(["scontrol", "requeue", id])


def cancel(refs: Iterable[JobRef]) -> None:
    """Cancel pending or running jobs: SIGTERM to each process, and SIGKILL after the cluster's KillWait.

    Raises:
        LaunchError: with Slurm's reason. A job that has already ended, or has another name, is no error.
    """
    # Not ``scancel --name``: it cancels a whole array where one pending task is named (Slurm 22.05).
    if ids := sorted(ref.id for ref, job in jobs(refs).items() if job.is_active):
        slurm_commands.lines(["scancel", *ids])


def _squeue(refs: Iterable[JobRef]) -> dict[JobRef, Job]:
    """The jobs that squeue lists, also those that ended within MinJobAge; each array task is one job."""
    format = "--format=%i|%T|%r|%N|%j"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={_bases(refs)}", format]
    try:
        lines = slurm_commands.lines(command)
    except LaunchError as error:
        if "Invalid job id" in str(error):  # the message if it lists none of them
            return {}
        raise
    return {job.ref: job for job in map(_parse_squeue, lines)}


def _bases(refs: Iterable[JobRef]) -> str:
    """The ids of jobs and arrays, as an argument of Slurm's commands."""
    return ",".join(sorted({ref.id.partition("_")[0] for ref in refs}))


def _unlisted_tasks(refs: Iterable[JobRef], listed: Iterable[JobRef]) -> dict[JobRef, Job]:
    """Array tasks missing in Slurm though it lists the array: tasks cancelled while pending leave no record."""
    arrays = {(ref.id.partition("_")[0], ref.name) for ref in listed}
    return {
        ref: Job(ref.id, "CANCELLED", is_guess=True, name=ref.name)
        for ref in refs
        if "_" in ref.id and (ref.id.partition("_")[0], ref.name) in arrays
    }


def _parse_squeue(line: str) -> Job:
    id, state, reason, nodes, name = line.split("|", 4)
    return Job(id, state, "" if reason == "None" else reason, nodes, name=name)


def _sacct(refs: Iterable[JobRef]) -> dict[JobRef, Job]:
    """The jobs that sacct lists, and the arrays they belong to; empty if there is no accounting.

    A ref without a name finds the latest job with its id.
    """
    refs = list(refs)
    if not refs:
        return {}
    fields = "--format=JobID,State,ExitCode,NodeList,Reason,JobName"
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={_bases(refs)}", fields]
    if names := ",".join(sorted({ref.name for ref in refs} - {""})):
        command.append(f"--name={names}")  # else sacct lists only the latest job of an id that was used again
    jobs = [_parse_sacct(line) for line in slurm_commands.lines(command, or_none=True) if line.count("|") >= 5]
    return {job.ref: job for job in jobs}


def _parse_sacct(line: str) -> Job:
    id, state, code, nodes, reason, name = line.split("|", 5)
    state = (state.split() or [""])[0].rstrip("+")
    number, _, signal = code.partition(":")
    ended = state not in ACTIVE
    reason = "" if reason == "None" else reason
    return Job(id, state, reason, nodes, int(number) if ended and number else None, int(signal or 0), name=name)
