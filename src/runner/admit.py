"""From composed jobs to frozen ones: everything that can be refused is refused here, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from runner import checks, config, parallel, prepare
from runner.compose import Job
from runner.errors import ConfigError, Fault
from runner.launch.protocol import Launcher


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
        prepare.keep_credentials(job.cfg)
        for fault in checks.faults_of(job.cfg) or _settle(job.cfg, processes):
            faults[str(fault)] = fault
    if faults:
        raise ConfigError(*faults.values())
    for job in jobs:
        job.cfg = prepare.freeze(job.cfg)


def launcher_of(cfg: dict[str, Any]) -> Launcher:
    launcher: Launcher = config.bind(cfg["launcher"], "launcher")()
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
        cfg["parallel"] = parallel.settle(cfg["parallel"], count)
    except ConfigError as error:
        return list(error.faults)
    return list(parallel.check_combination(cfg))
