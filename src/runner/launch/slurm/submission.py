"""A submission, written down before Slurm hears of it, so that no run is ever submitted twice.

Between sbatch and the moment its answer is noted the submitting process may die. The file says by which name Slurm
knows what it was to submit; whoever comes next looks there before it submits anything.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.files import write_atomic
from runner.launch.slurm.request import Cluster
from runner.tracking import slurm_client
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import slurm_room

if TYPE_CHECKING:
    from runner.launch.slurm.request import SlurmRequest

LONGEST_LEAVE_S = 120.0
"""How long a job may need to leave its nodes: KillWait is 30 s where nobody set it."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is handed to the scheduler at once: one job, or one array with a task for each folder."""

    name: str
    """The job's name in Slurm, like no other."""
    folders: list[str]
    cluster: Cluster
    max_requeues: int
    signal_delay_s: int
    """How long before its time limit a job is told to save."""
    code: str | None
    """The snapshot that its jobs run; None: the code that is installed."""
    created: float
    after: str | None = None
    """The jobs of its sweep that have to end first, joined by colons."""
    job_id: str | None = None
    """The id that Slurm gave the whole; None until it is noted."""

    def job_ids(self) -> list[str]:
        """The id of each folder's job."""
        assert self.job_id
        if len(self.folders) == 1:
            return [self.job_id]
        return [f"{self.job_id}_{number}" for number in range(len(self.folders))]


def path(home: Path, name: str) -> Path:
    return slurm_room(home) / f"{name}.json"


def begin(
    asked: SlurmRequest, home: Path, rundirs: Sequence[RunDir], code: Path | None, after: str | None
) -> Submission:
    """Write down what is about to be submitted."""
    submission = Submission(
        name=f"runner-{secrets.token_hex(6)}", folders=[str(rundir.path) for rundir in rundirs],
        cluster=asked.cluster, max_requeues=asked.max_requeues, signal_delay_s=asked.signal_delay_s,
        code=str(code) if code else None, created=time.time(), after=after,
    )  # fmt: skip
    write_atomic(path(home, submission.name), json.dumps(asdict(submission), indent=1))
    return submission


def note(home: Path, submission: Submission, job_id: str) -> None:
    """Write down the id that the scheduler gave, in each run's manifest too."""
    known = Submission(**{**asdict(submission), "job_id": job_id})
    snapshot = {"snapshot": {"folder": known.code}} if known.code else {}
    for folder, id in zip(known.folders, known.job_ids(), strict=True):
        job = {"job_id": id, "name": known.name, "cluster": known.cluster, "submitted": known.created}
        RunDir(Path(folder)).update_manifest(slurm=job, **snapshot)
    write_atomic(path(home, known.name), json.dumps(asdict(known), indent=1))


def adopt(home: Path) -> list[str]:
    """Find what earlier processes submitted without living to note it; returns the ids that were found.

    Raises:
        LaunchError: Slurm does not say; to submit now could be to submit twice.
    """
    found = []
    for submission in [each for each in _all(home) if each.job_id is None]:
        ids = slurm_client.named(submission.name) if submission.cluster == "slurm" else []
        if ids:
            note(home, submission, ids[0])
            found.append(ids[0])
        else:
            path(home, submission.name).unlink()
    return found


def noted(home: Path) -> list[Submission]:
    """What was submitted there and is known by its id, oldest first."""
    return sorted((each for each in _all(home) if each.job_id), key=lambda each: each.created)


def is_queued(rundirs: Sequence[RunDir]) -> list[bool]:
    """For each run whether the job that its manifest notes still waits or runs.

    Raises:
        LaunchError: Slurm does not answer.
    """
    jobs = [rundir.read_manifest().get("slurm") or {} for rundir in rundirs]
    known = slurm_client.jobs(job["job_id"] for job in jobs if job.get("cluster") == "slurm")
    active = {id for id, job in known.items() if job.is_active}
    return [
        job.get("job_id") in active or (job.get("cluster") == "local" and is_process(job["job_id"])) for job in jobs
    ]


def wait_until_left(rundirs: Sequence[RunDir]) -> list[RunDir]:
    """Wait while jobs of runs that have ended leave their nodes; returns the runs whose jobs do not.

    Raises:
        LaunchError: Slurm does not answer.
    """
    ended = [rundir for rundir in rundirs if rundir.read_state().status in ("killed", "failed")]
    jobs = [(rundir, rundir.read_manifest().get("slurm") or {}) for rundir in ended]
    ids = {job["job_id"]: rundir for rundir, job in jobs if job.get("cluster") == "slurm"}
    give_up_at = time.monotonic() + LONGEST_LEAVE_S
    while True:
        known = slurm_client.jobs(ids)
        leaving = [rundir for id, rundir in ids.items() if id in known and known[id].state == "COMPLETING"]
        if not leaving or time.monotonic() > give_up_at:
            return leaving
        time.sleep(1)


def _all(home: Path) -> list[Submission]:
    return [Submission(**json.loads(file.read_text())) for file in sorted(slurm_room(home).glob("runner-*.json"))]


def is_process(pid: str) -> bool:
    """Whether a job of submitit's local cluster, whose id is the pid of its supervisor, still lives."""
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
        command = Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return False
    return state != "Z" and b"submitit" in command
