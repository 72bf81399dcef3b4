"""Check composed jobs, then write their run folders. All faults are found before anything is written."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runner.config import bind, chat_template_file, check, user_code
from runner.config.job import Job, write_hydra
from runner.errors import ConfigError, Fault
from runner.launch import continuation, start_digest
from runner.launch.launcher import Launcher
from runner.tracking import environment, manifest, recovery, resume
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import refuse_inside, refuse_slurm_room
from runner.train.distributed import parallel


def admit(jobs: Iterable[Job], processes: int | None = None, *, is_new: bool = True) -> None:
    """Check all jobs and freeze their configurations in place.

    Args:
        processes: world size, if the processes were started from outside (torchrun); None: the launcher's.
        is_new: False for the configuration of an earlier run, which keeps its MLflow store.

    Raises:
        ConfigError: the faults of all jobs, each once.
    """
    faults: dict[str, Fault] = {}
    known: check.Known = {}
    jobs = list(jobs)
    for job in jobs:
        if is_new:
            continuation.settle(job)
        if is_new and job.cfg["resume"] in (None, "auto"):
            faults |= {str(fault): fault for fault in environment.settle(job.cfg, job.overrides)}
        manifest.keep_credentials(job.cfg)
        settled = [*_code_faults(job), *chat_template_file.settle(job.cfg)] or list(start_digest.settle(job.cfg))
        for fault in settled or check.faults_of(job.cfg, known) or _resolve_parallel(job.cfg, processes):
            faults[str(fault)] = fault
    if faults:
        raise ConfigError(*faults.values())
    for job in jobs:
        job.cfg = manifest.freeze(job.cfg)
        for note in environment.notes(job.cfg["tracking"]) if is_new else ():
            _say(note)


@functools.cache
def _say(note: str) -> None:
    """Print a note, once for all jobs and trials of a command."""
    print(f"note: {note}", file=sys.stderr)


def _code_faults(job: Job) -> list[Fault]:
    """Find the user's own code and record its digests; returns the faults."""
    try:
        user_code.settle(job.cfg, job.code_folders)
    except ConfigError as error:
        return list(error.faults)
    return []


def launcher_of(cfg: dict[str, Any]) -> Launcher:
    launcher: Launcher = bind.bind(cfg["launcher"], "launcher")()
    return launcher


def by_launcher(configs: Iterable[dict[str, Any]]) -> list[tuple[Launcher, list[int]]]:
    """Group configurations by their launcher; returns (launcher, indices of its configurations)."""
    groups: dict[str, tuple[Launcher, list[int]]] = {}
    for index, cfg in enumerate(configs):
        key = json.dumps(cfg["launcher"], sort_keys=True)
        if key not in groups:
            groups[key] = launcher_of(cfg), []
        groups[key][1].append(index)
    return list(groups.values())


def _resolve_parallel(cfg: dict[str, Any], processes: int | None) -> list[Fault]:
    """Write the world size into ``cfg["parallel"]``, because it changes what is computed; returns the faults."""
    world_size = processes if processes is not None else getattr(launcher_of(cfg), "processes", 1)
    try:
        cfg["parallel"] = parallel.resolve(cfg["parallel"], world_size)
    except ConfigError as error:
        return list(error.faults)
    return list(parallel.check_combination(cfg))


def prepared(job: Job, folder: Path, command: list[str], *, is_new: bool = False, **notes: Any) -> RunDir:
    """Write ``.hydra/`` and the frozen configuration into the run's folder; an existing run is kept as it is.

    Args:
        is_new: create a new folder, with another name if ``folder`` exists.
        notes: more entries of manifest.json.
    """
    if "cluster" in job.cfg["launcher"]:
        refuse_slurm_room(folder)
    if not is_new and RunDir(folder).manifest.exists():
        manifest.refuse_other(RunDir(folder), job.cfg)
        return RunDir(folder)
    if not notes.get("sweep"):
        refuse_inside(folder, "hydra.run.dir")
    folder, created = resume.make(folder, is_new=is_new)
    name = {"name": job.cfg["name"] or notes["label"]} if notes.get("label") else {}
    try:
        write_hydra(job, folder)
        notes = {"choices": job.choices, **job.notes, **notes, **name}
        rundir = manifest.create(job.cfg, folder, command, job.overrides, created, **notes)
        if job.continues:
            continuation.copy_state(RunDir(job.continues), rundir)
        return rundir
    except BaseException:  # a full disk, for example: leave no incomplete run folder
        with contextlib.suppress(OSError):  # report the first error, not the failed clean-up
            if not RunDir(folder).manifest.exists():
                recovery.discard(RunDir(folder), created)
        raise
