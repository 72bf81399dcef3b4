"""From composed jobs to frozen ones: everything that can be refused is refused here, before anything is written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runner.config import bind, check, user_code
from runner.config.compose import Job, write_hydra
from runner.errors import ConfigError, Fault
from runner.launch.launcher import Launcher
from runner.tracking import manifest, resume
from runner.tracking.rundir import RunDir
from runner.train.distributed import parallel


def admit(jobs: Iterable[Job], processes: int | None = None) -> None:
    """Check all jobs and freeze the configuration of each.

    Args:
        processes: how many there are, where somebody else started them (torchrun); None: as the launcher says.

    Raises:
        ConfigError: with the faults of all of them, each once.
    """
    faults: dict[str, Fault] = {}
    jobs = list(jobs)
    for job in jobs:
        manifest.keep_credentials(job.cfg)
        for fault in _code_faults(job) or check.faults_of(job.cfg) or _settle(job.cfg, processes):
            faults[str(fault)] = fault
    if faults:
        raise ConfigError(*faults.values())
    for job in jobs:
        job.cfg = manifest.freeze(job.cfg)


def _code_faults(job: Job) -> list[Fault]:
    """Find the user's own code and note its digests; returns what is wrong with it."""
    try:
        user_code.settle(job.cfg, job.code_folders)
    except ConfigError as error:
        return list(error.faults)
    return []


def launcher_of(cfg: dict[str, Any]) -> Launcher:
    launcher: Launcher = bind.bind(cfg["launcher"], "launcher")()
    return launcher


def by_launcher(configs: Iterable[dict[str, Any]]) -> list[tuple[Launcher, list[int]]]:
    """The launchers of these configurations, each with the numbers of those that name it."""
    groups: dict[str, list[int]] = {}
    found: dict[str, Launcher] = {}
    for number, cfg in enumerate(configs):
        key = json.dumps(cfg["launcher"], sort_keys=True)
        groups.setdefault(key, []).append(number)
        if key not in found:
            found[key] = launcher_of(cfg)
    return [(found[key], numbers) for key, numbers in groups.items()]


def _settle(cfg: dict[str, Any], processes: int | None) -> list[Fault]:
    """Write into the configuration over how many processes the run is spread: it changes what is computed."""
    count = processes if processes is not None else getattr(launcher_of(cfg), "processes", 1)
    try:
        cfg["parallel"] = parallel.resolve(cfg["parallel"], count)
    except ConfigError as error:
        return list(error.faults)
    return list(parallel.check_combination(cfg))


def prepared(job: Job, folder: Path, command: list[str], *, is_new: bool = False, **notes: Any) -> RunDir:
    """The run's folder with ``.hydra/`` and our frozen configuration in it; that of an earlier run as it is.

    ``is_new``: it gets a folder of its own, whatever appears in ``folder`` meanwhile.
    """
    if not is_new and RunDir(folder).manifest.exists():
        manifest.refuse_other(RunDir(folder), job.cfg)
        return RunDir(folder)
    folder, made = resume.make(folder, is_new=is_new)
    name = {"name": job.cfg["name"] or notes["label"]} if notes.get("label") else {}
    try:
        write_hydra(job, folder)
        return manifest.prepare(job.cfg, folder, command, job.overrides, made, choices=job.choices, **notes, **name)
    except BaseException:  # a full disk: half a run is none
        with contextlib.suppress(OSError):  # what stopped it is said, not what cannot be removed
            if not RunDir(folder).manifest.exists():
                RunDir(folder).discard(made)
        raise
