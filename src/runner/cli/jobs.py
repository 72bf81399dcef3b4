"""Compose and check the jobs of a command line before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.errors import ConfigError, Fault

SWEEP_KEYS = ("sweep", "search", "launcher.parallel", "launcher.array_parallelism")
"""Prefixes of keys that have no effect on a single run."""


@contextmanager
def composed(argv: list[str]) -> Iterator[tuple[Any, list[Any]]]:
    """Compose and check every job of a command line; yields (composer, jobs).

    The runs of a search are not known in advance: it yields one job of its search space.

    Raises:
        ConfigError: with the faults of all jobs.
    """
    from runner.config import command_line, compose, overrides
    from runner.launch import prepare
    from runner.sweep import search

    args = command_line.parse(argv)
    with command_line.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if not may_sweep(args):
            refuse_sweep_keys(composer)
        if not composer.is_sweep():
            jobs = [composer.single()]
        elif (sweeper := overrides.sweeper_of(composer.master())) != "runner":
            problem, remedy = "chooses the runs itself, one after the other", "leave it out to see the runs of a grid"
            raise ConfigError(Fault(overrides.SWEEPER, problem, remedy, sweeper))
        elif settings := search.chosen_by(composer):
            yield composer, [search.planned(composer, settings)]
            return
        else:
            jobs = composer.jobs(composer.grid(args.overrides))
        prepare.admit(jobs)
        yield composer, jobs


def may_sweep(args: Any) -> bool:
    """Whether the command line may start a sweep. With ``hydra.mode=…`` only Hydra can decide."""
    return args.multirun or any(override.startswith("hydra.mode=") for override in args.overrides)


def refuse_sweep_keys(composer: Any) -> None:
    """Refuse keys that have no effect on a single run, and keys with several values.

    Raises:
        ConfigError: with all of them.
    """
    overrides = (override.partition("=") for override in composer.args.overrides)
    ignored = {
        key.lstrip("+"): value for key, _, value in overrides
        if key.lstrip("+").startswith(SWEEP_KEYS) and value not in ("null", "grid")
    }  # fmt: skip
    faults = [
        Fault(key, "has no effect without -m", "add -m, or leave it out", value) for key, value in ignored.items()
    ]
    for key, _, values in (text.partition("=") for text in composer.swept):
        remedy = "add -m to sweep over them (python -m runner -m …), or quote the value if it is one"
        faults.append(Fault(key, "has several values, but this is a single run", remedy, values))
    if faults:
        raise ConfigError(*faults)
