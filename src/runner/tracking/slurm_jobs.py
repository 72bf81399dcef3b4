"""Find the jobs of runs: in Slurm by the recorded id and name, on this machine the process of submitit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.tracking import lookup, slurm_client, slurm_commands
from runner.tracking.rundir import RunDir
from runner.tracking.slurm_client import Job, JobRef
from runner.tracking.sweepdir import home_of, slurm_room

WITHOUT_SLURM = ("local", "debug")
"""``launcher.cluster`` with which submitit runs the job without Slurm."""
NO_JOB = JobRef("", "")


def ref(manifest: Mapping[str, Any]) -> JobRef:
    """The Slurm job in manifest.json; NO_JOB if there is none."""
    job = manifest.get("slurm") or {}
    if job.get("cluster") in WITHOUT_SLURM:
        return NO_JOB
    return JobRef(str(job.get("job_id") or ""), str(job.get("name") or ""))


def supervisor(rundir: RunDir, manifest: Mapping[str, Any]) -> int | None:
    """Pid of submitit's process that supervises the run (launcher.cluster=local); None if it has ended.

    The pid may have been used again: its command line must name the folder from which the run was submitted.
    """
    job = manifest.get("slurm") or {}
    if job.get("cluster") != "local":
        return None
    import psutil

    with contextlib.suppress(psutil.Error, ValueError, OSError):
        process = psutil.Process(int(job["job_id"]))
        words = process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
        if words[1:-1] == ["-m", "submitit.local._local"] and os.path.samefile(words[-1], slurm_room(home_of(rundir))):
            return process.pid
    return None


class Queue:
    """Slurm's jobs for one status query. If Slurm does not answer: one warning, and no further calls."""

    def __init__(self) -> None:
        self._unrecorded: dict[Path, dict[str, JobRef]] = {}

    def jobs(self, refs: Iterable[JobRef]) -> dict[JobRef, Job] | None:
        """The jobs that Slurm lists; None if Slurm does not answer."""
        refs = sorted({*refs} - {NO_JOB})
        if not refs:
            return {}
        if not self._answers:
            return None
        try:
            return dict(slurm_client.jobs(refs))
        except RunnerError as error:
            self._is_silent(str(error))
            return None

    def unrecorded_jobs(self, home: Path) -> dict[str, JobRef]:
        """Run folder → job, for submissions below ``home`` whose submitter died before it recorded the id."""
        if home not in self._unrecorded:
            self._unrecorded[home] = dict(self._find_unrecorded(home))
        return self._unrecorded[home]

    def _find_unrecorded(self, home: Path) -> Iterable[tuple[str, JobRef]]:
        for file in slurm_room(home).glob("runner-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged or removed
                submission = json.loads(file.read_text())
                if submission["job_id"] or submission["cluster"] != "slurm" or not self._answers:
                    continue
                folders, name = submission["folders"], submission["name"]
                try:
                    array_ids = slurm_client.named(name)
                except RunnerError as error:
                    self._is_silent(str(error))
                    return
                for id in array_ids[:1]:
                    ids = [f"{id}_{number}" for number in range(len(folders))] if len(folders) > 1 else [id]
                    yield from zip(folders, [JobRef(id, name) for id in ids], strict=True)

    @functools.cached_property
    def _answers(self) -> bool:
        if problem := slurm_commands.silence():
            self._is_silent(problem)
        return not problem

    def _is_silent(self, problem: str) -> None:
        """Warn, and stop calling Slurm: a controller that answers a ping may still not answer squeue."""
        self._answers = False
        lookup.log.warning(f"Slurm does not answer, so the states of its jobs are missing: {problem}")
