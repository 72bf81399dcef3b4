"""What Slurm says of jobs, through its own commands: ``squeue``, ``sacct``, ``scontrol`` and ``scancel``.

A job's id is ``123``, or ``123_4`` where it is task 4 of an array.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.errors import Fault, LaunchError

Fate = Literal["running", "requeued", "cancelled", "ended"]

ACTIVE = (
    "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
)  # fmt: skip
"""States of a job that will run, runs, or is about to leave its nodes; every other one is final."""

ON_ITS_WAY = ("REQUEUED", "PREEMPTED", "NODE_FAIL")
"""States of accounting that may be followed by another start; for an instant squeue shows nothing of such a job."""

LONGEST_WAIT_S = 60.0
"""How long a busy controller may take over an answer."""

LONGEST_PING_S = 20.0
"""How long it may take to say that it is there: twice Slurm's own MessageTimeout."""


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as Slurm sees it at this moment."""

    id: str
    state: str
    """Slurm's word in capitals, without what follows it (``CANCELLED by 0`` is ``CANCELLED``)."""
    reason: str = ""
    """Why it waits, or why it failed; empty where Slurm gives none."""
    nodes: str = ""
    exit_code: int | None = None
    """What its script ended with; None while it has not, or where accounting does not say."""
    signal: int = 0
    """The signal that ended it, 0 where none did."""
    is_guess: bool = False
    """Whether Slurm knows the array and not this task: cancelled while it waited, or forgotten after it had run."""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """The jobs among ``ids`` that Slurm knows: one call of squeue, and one of sacct where squeue is not enough.

    What the queue says of a waiting or running job stands above accounting, which calls a job that was requeued after
    its node died NODE_FAIL for a while. Where accounting is off, ended jobs are known as long as the queue keeps them.

    Raises:
        LaunchError: squeue is missing, or the controller does not answer.
    """
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    queue = _queued(wanted)
    found = {id: queue[id] for id in wanted if id in queue}
    accounts = _accounted([id for id in wanted if id not in found or not found[id].is_active])
    known = {id: accounts[id] for id in wanted if id in accounts and (not accounts[id].is_active or id not in found)}
    if moving := [id for id, job in known.items() if job.state in ON_ITS_WAY]:
        known.update({id: job for id, job in _queued(moving).items() if id in moving and job.is_active})
    return {**_never_split(wanted, [*queue, *accounts]), **found, **known}


def named(name: str) -> list[str]:
    """The ids of the jobs with this name, without those of array tasks: whatever was submitted under it, once each."""
    lines = _lines(["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%F"])
    with_past = ["sacct", "--noheader", "--parsable2", "--allocations", f"--name={name}", "--starttime=now-30days"]
    lines = lines or _lines([*with_past, "--format=JobID"], or_none=True)
    return sorted({line.partition("_")[0] for line in lines})


def fate(id: str, restarts: int) -> Fate:
    """What becomes of a job that was told to stop, asked from inside of it.

    Args:
        restarts: how often it had been requeued when it started (``SLURM_RESTART_COUNT``).

    Raises:
        LaunchError: the controller does not answer.
    """
    (line, *_) = [*_lines(["scontrol", "--oneliner", "show", "job", id]), ""]
    facts = dict(re.findall(r"(JobState|Restarts|ExitCode)=(\S+)", line))
    state = facts.get("JobState", "")
    if state in ("RUNNING", "SIGNALING", "STOPPED", "SUSPENDED"):
        return "running"
    if int(facts.get("Restarts", 0)) > restarts or state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        return "requeued"
    # COMPLETING hides why; accounting has it, else the signal: only a cancelled job has been given one by Slurm.
    known = _accounted([id]).get(id)
    if known is None:
        return "cancelled" if state == "CANCELLED" or facts.get("ExitCode") == "0:15" else "ended"
    if known.state in ON_ITS_WAY:
        return "requeued"
    return "cancelled" if known.state == "CANCELLED" else "ended"


def seconds_left(id: str) -> float:
    """How long a job may still run before its time limit; infinite where it has none, or Slurm does not say.

    Raises:
        LaunchError: the controller does not answer.
    """
    (left, *_) = [*_lines(["squeue", "--noheader", "--format=%L", f"--jobs={id}"]), ""]
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left.strip())
    if not found:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def own_id() -> str:
    """The job that this process belongs to, as Slurm's commands name it; empty outside of any."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def own_restarts() -> int:
    """How often that job had been requeued when this process started."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def is_cancelled() -> bool:
    """Whether the job that this process belongs to is being cancelled; False where Slurm does not say."""
    try:
        return bool(own_id()) and fate(own_id(), own_restarts()) == "cancelled"
    except LaunchError:
        return False


def requeue(id: str) -> None:
    """Put a running job back into the queue; Slurm ends what is left of it.

    Raises:
        LaunchError: with Slurm's reason, as where the job or the cluster does not allow it.
    """
    _lines(["scontrol", "requeue", id])


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs, waiting or running: SIGTERM to each process, and SIGKILL after the cluster's KillWait.

    Raises:
        LaunchError: with Slurm's reason. A job that has ended already is none.
    """
    if ids:
        _lines(["scancel", *sorted(set(ids))])


def settings(*names: str) -> dict[str, str]:
    """These lines of Slurm's own configuration (``scontrol show config``); those that it has not are left out."""
    pairs = [re.split(r"\s*=\s*", line, maxsplit=1) for line in _lines(["scontrol", "show", "config"])]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[0] in names}


def partitions() -> list[str]:
    """The names of all partitions."""
    return sinfo("%R")


def sinfo(format: str, partition: str | None = None) -> list[str]:
    """What sinfo says of the cluster's partitions or nodes, each different line once; nothing where it is missing."""
    command = ["sinfo", "--noheader", f"--format={format}", *([f"--partition={partition}"] if partition else [])]
    return list(dict.fromkeys(line.strip() for line in _lines(command, or_none=True)))


def refuse_unreachable() -> None:
    """Refuse where there is no Slurm to talk to, without the minute that sbatch would wait for it.

    Raises:
        LaunchError: a command is missing, or no controller answers.
    """
    for command in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(command) is None:
            remedy = "start from a machine of the cluster, or set launcher.cluster=local to run here"
            raise LaunchError(Fault("launcher", f"{command} is not on this machine's PATH", remedy, "slurm"))
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():
        raise LaunchError(Fault("launcher", f"SLURM_CONF names {conf}, which is no file", "correct it", "slurm"))
    if said := silence():
        remedy = "ask who runs the cluster, or set launcher.cluster=local to run here"
        raise LaunchError(Fault("launcher", f"the Slurm controller does not answer: {said}", remedy, "slurm"))


def silence() -> str:
    """Why no controller answers, in Slurm's own words; empty where one does.

    At once where its machine says no, where nothing comes back after its MessageTimeout and at the latest 20 s: squeue
    and sbatch try again and again for as long as that and longer.
    """
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=LONGEST_PING_S, check=False)
    except FileNotFoundError:
        return "scontrol is not on this machine's PATH"
    except subprocess.TimeoutExpired:
        return f"no answer within {LONGEST_PING_S:.0f} s"
    except OSError as error:  # no process left, no memory
        return f"scontrol cannot be started: {error.strerror}"
    return "" if re.search(r"is UP", done.stdout) else _first_line(done.stdout + done.stderr)


def _queued(ids: Sequence[str]) -> dict[str, Job]:
    """The jobs that the controller still keeps, also those that ended within its MinJobAge; by task, not by array."""
    bases = ",".join(sorted({id.partition("_")[0] for id in ids}))
    format = "--format=%i|%T|%r|%N"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={bases}", format]
    try:
        lines = _lines(command)
    except LaunchError as error:
        if "Invalid job id" in str(error):  # so it says when it knows none of them
            return {}
        raise
    return {job.id: job for job in map(_job_in_queue, lines)}


def _never_split(wanted: Sequence[str], known: Iterable[str]) -> dict[str, Job]:
    """The tasks of arrays that Slurm knows without them: cancelled while they waited, they leave no trace anywhere."""
    arrays = {id.partition("_")[0] for id in known}
    return {id: Job(id, "CANCELLED", is_guess=True) for id in wanted if "_" in id and id.partition("_")[0] in arrays}


def _job_in_queue(line: str) -> Job:
    id, state, reason, nodes = line.split("|", 3)
    return Job(id, state, "" if reason == "None" else reason, nodes)


def _accounted(ids: Sequence[str]) -> dict[str, Job]:
    """What accounting keeps of jobs, and of the arrays they are of; nothing where there is no accounting."""
    if not ids:
        return {}
    bases = ",".join(sorted({id.partition("_")[0] for id in ids}))
    fields = "--format=JobID,State,ExitCode,NodeList,Reason"
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={bases}", fields]
    found = [_job_in_accounting(line) for line in _lines(command, or_none=True) if line.count("|") >= 4]
    return {job.id: job for job in found}


def _job_in_accounting(line: str) -> Job:
    id, state, code, nodes, reason = line.split("|", 4)
    state = (state.split() or [""])[0].rstrip("+")
    number, _, signal = code.partition(":")
    ended = state not in ACTIVE
    reason = "" if reason == "None" else reason
    return Job(id, state, reason, nodes, int(number) if ended and number else None, int(signal or 0))


def _lines(command: list[str], *, or_none: bool = False) -> list[str]:
    """What a command of Slurm prints; ``or_none``: nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_WAIT_S, check=False)
        said = "" if done.returncode == 0 else done.stderr or done.stdout or f"exit code {done.returncode}"
    except FileNotFoundError:
        said = "is not on this machine's PATH"
    except subprocess.TimeoutExpired:
        said = f"no answer within {LONGEST_WAIT_S:.0f} s"
    except OSError as error:
        said = f"cannot be started: {error.strerror}"
    if not said:
        return [line for line in done.stdout.splitlines() if line.strip()]
    if or_none:
        return []
    raise LaunchError(Fault("", f"{command[0]}: {_first_line(said)}", "try again when Slurm answers"))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error|fatal): ", "", lines[0]) if lines else "it says nothing"
