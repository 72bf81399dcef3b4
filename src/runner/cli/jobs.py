"""The jobs of a command line: composed and checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.errors import ConfigError, Fault

OF_SWEEPS = ("sweep", "search", "launcher.parallel", "launcher.array_parallelism")
"""What keys begin with that mean nothing to one run."""


@contextmanager
def composed(argv: list[str]) -> Iterator[tuple[Any, list[Any]]]:
    """Compose and check every run of a command line, before anything is written; yields (composer, jobs).

    Of a search, whose runs are not known, the first of those that stand for its space.

    Raises:
        ConfigError: with the faults of all of them.
    """
    from runner.config import compose
    from runner.launch import prepare
    from runner.sweep import search

    args = compose.parse(argv)
    with compose.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if not may_sweep(args):
            refuse_of_sweeps(composer)
        if not composer.is_sweep():
            jobs = [composer.single()]
        elif wanted := search.asked_for(composer):
            yield composer, [search.planned(composer, wanted)]
            return
        else:
            jobs = composer.jobs(composer.grid(args.overrides))
        prepare.admit(jobs)
        yield composer, jobs


def may_sweep(args: Any) -> bool:
    """Whether the command line asks for a sweep; where ``hydra.mode`` is given Hydra has to be asked."""
    return args.multirun or any(override.startswith("hydra.mode=") for override in args.overrides)


def refuse_of_sweeps(composer: Any) -> None:
    """Refuse, for one run, what only a sweep heeds."""
    given = (override.partition("=") for override in composer.args.overrides)
    told = {
        key.lstrip("+"): value for key, _, value in given
        if key.lstrip("+").startswith(OF_SWEEPS) and value not in ("null", "grid")
    }  # fmt: skip
    faults = [Fault(key, "has no effect without -m", "add -m, or leave it out", told[key]) for key in told]
    for key, _, values in (text.partition("=") for text in composer.swept):
        remedy = "add -m: python -m runner -m …; or quote it, if it is one value"
        faults.append(Fault(key, "has several values, and this is one run", remedy, values))
    if faults:
        raise ConfigError(*faults)
