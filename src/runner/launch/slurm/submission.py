"""Submission records: a file written before sbatch is called, so that no run is submitted twice.

The submitting process may die after sbatch and before it has recorded the job id. The record contains the job's unique
name; the next command looks for that name in the queue before it submits anything.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from runner.files import at_once, write_atomic
from runner.launch.slurm.request import Cluster, SlurmRequest
from runner.tracking import naming, slurm_client, slurm_jobs
from runner.tracking.rundir import RunDir
from runner.tracking.slurm_client import JobRef
from runner.tracking.sweepdir import slurm_room

LONGEST_NAME = 40
"""Characters of a run's or sweep's name in the name of its job."""
LONGEST_LEAVE_S = 120.0
"""How long a job may stay in state COMPLETING; Slurm's KillWait is 30 s by default."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One call of sbatch: one job, or one array with a task per run folder."""

    name: str
    """Unique name of the job in Slurm."""
    folders: list[str]
    cluster: Cluster
    max_requeues: int
    signal_delay_s: int
    """Seconds before the time limit at which Slurm sends the signal to save."""
    code: str | None
    """Folder of the code snapshot; None: the installed code."""
    created: float
    after: str | None = None
    """Ids of the sweep's jobs that have to end first, joined by colons."""
    job_id: str | None = None
    """Slurm's id of the job or array; None until recorded."""

    def refs(self) -> list[JobRef]:
        """The job of each folder."""
        return [JobRef(id, self.name) for id in self.job_ids()]

    def job_ids(self) -> list[str]:
        """The job id of each folder."""
        assert self.job_id
        if len(self.folders) == 1:
            return [self.job_id]
        return [f"{self.job_id}_{number}" for number in range(len(self.folders))]


def path(home: Path, name: str) -> Path:
    return slurm_room(home) / f"{name}.json"


def begin(
    request: SlurmRequest, home: Path, rundirs: Sequence[RunDir], code: Path | None, after: str | None
) -> Submission:
    """Write the record of a submission, before sbatch is called."""
    submission = Submission(
        name=job_name(home, rundirs), folders=[str(rundir.path) for rundir in rundirs],
        cluster=request.cluster, max_requeues=request.max_requeues, signal_delay_s=request.signal_delay_s,
        code=str(code) if code else None, created=time.time(), after=after,
    )  # fmt: skip
    write_atomic(path(home, submission.name), json.dumps(asdict(submission), indent=1))
    return submission


def job_name(home: Path, rundirs: Sequence[RunDir]) -> str:
    """A new name of a job, in which squeue shows the name of the sweep, or of the run: ``runner-lora.r-308af34d``."""
    is_sweep = home != rundirs[0].path
    readable = home.name if is_sweep else naming.short_name(rundirs[0].read_manifest()) or home.name
    plain = re.sub(r"[^A-Za-z0-9._+]+", "-", readable).strip("-")[:LONGEST_NAME]
    return "-".join(filter(None, ["runner", plain, secrets.token_hex(4)]))


def note(home: Path, submission: Submission, job_id: str) -> None:
    """Record the job id, in the submission's file and in each run's manifest."""
    known = Submission(**{**asdict(submission), "job_id": job_id})
    snapshot = {"snapshot": {"folder": known.code}} if known.code else {}
    for_all = {"name": known.name, "cluster": known.cluster, "submitted": known.created}
    at_once(
        partial(RunDir(Path(folder)).update_manifest, slurm={"job_id": id, **for_all}, **snapshot)
        for folder, id in zip(known.folders, known.job_ids(), strict=True)
    )
    write_atomic(path(home, known.name), json.dumps(asdict(known), indent=1))


def adopt(home: Path) -> list[str]:
    """Record the ids of jobs whose submitting process died before it could; returns these ids.

    Raises:
        LaunchError: squeue fails; submitting now could submit a run twice.
    """
    adopted = []
    for submission in [each for each in _all(home) if each.job_id is None]:
        ids = slurm_client.named(submission.name) if submission.cluster == "slurm" else []
        if ids:
            note(home, submission, ids[0])
            adopted.append(ids[0])
        else:
            path(home, submission.name).unlink()
    return adopted


def recorded(home: Path) -> list[Submission]:
    """Submissions of this run or sweep that have a job id, oldest first."""
    return sorted((each for each in _all(home) if each.job_id), key=lambda each: each.created)


def is_queued(rundirs: Sequence[RunDir]) -> list[bool]:
    """For each run, whether the job in its manifest is still waiting or running.

    Raises:
        LaunchError: squeue fails.
    """
    manifests = [rundir.read_manifest() for rundir in rundirs]
    known = slurm_client.jobs(map(slurm_jobs.ref, manifests))
    active = {ref for ref, job in known.items() if job.is_active}
    return [
        slurm_jobs.ref(manifest) in active or slurm_jobs.supervisor(rundir, manifest) is not None
        for rundir, manifest in zip(rundirs, manifests, strict=True)
    ]


def wait_until_left(rundirs: Sequence[RunDir]) -> list[RunDir]:
    """Wait until the jobs of ended runs have left their nodes; returns the runs whose jobs have not.

    Raises:
        LaunchError: squeue fails.
    """
    ended = [rundir for rundir in rundirs if rundir.read_state().status in ("killed", "failed")]
    refs = {slurm_jobs.ref(rundir.read_manifest()): rundir for rundir in ended}
    deadline = time.monotonic() + LONGEST_LEAVE_S
    while True:
        known = slurm_client.jobs(refs)
        leaving = [rundir for ref, rundir in refs.items() if ref in known and known[ref].state == "COMPLETING"]
        if not leaving or time.monotonic() > deadline:
            return leaving
        time.sleep(1)


def _all(home: Path) -> list[Submission]:
    return [Submission(**json.loads(file.read_text())) for file in sorted(slurm_room(home).glob("runner-*.json"))]
