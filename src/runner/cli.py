"""The command line: a bare verb first, or Hydra's grammar. Exit codes: 0, 1 failed, 2 refused, 75, 130."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, Fault, RunnerError, suggest

Verb = Callable[[list[str]], int]


def run(argv: list[str]) -> int:
    """Do what the words ask for; returns the exit code, with a refusal told in one message."""
    try:
        if argv and _is_word(argv[0]):
            return _verb(argv[0])(argv[1:])
        return _hydra(argv)
    except RunnerError as error:
        _tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def plan(argv: list[str]) -> int:
    """What the run would be, without training it."""
    from runner import plan as planning

    if {"-h", "--help"} & set(argv):
        print(planning.HELP)
        return 0
    with composed(argv) as (_, jobs):
        for job in jobs:
            planning.show(job.cfg)
    return 0


def sync(argv: list[str]) -> int:
    """Bring to MLflow what it has not got yet."""
    from runner import mirror

    return mirror.sync_command(argv)


VERBS: dict[str, Verb] = {"plan": plan, "sync": sync}


def _is_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith(("-", "~", "+"))


def _verb(name: str) -> Verb:
    if name not in VERBS:
        allowed = f"{suggest(name, VERBS)} verbs: {', '.join(VERBS)}; an override is written key=value".strip()
        raise ConfigError(Fault(name, "no such verb", allowed))
    return VERBS[name]


def _hydra(argv: list[str]) -> int:
    from runner import compose

    args = compose.parse(argv)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return _ask_hydra(args, argv)
    with composed(argv) as (hydra, jobs):
        return _run_all(hydra, jobs, argv) if args.multirun else _run_one(hydra, jobs[0], argv)


@contextmanager
def composed(argv: list[str]) -> Iterator[tuple[Any, list[Any]]]:
    """Compose and check every run of a command line, before anything is written; yields (hydra, jobs).

    Raises:
        ConfigError: with the faults of all of them.
    """
    from runner import checks, compose, prepare

    args = compose.parse(argv)
    with compose.opened(args) as hydra:
        jobs = compose.sweep(hydra, args) if args.multirun else [compose.single(hydra, args)]
        faults: dict[str, Fault] = {}
        for job in jobs:
            try:
                checks.check(job.cfg)
            except ConfigError as error:
                faults.update({str(fault): fault for fault in error.faults})
        if faults:
            raise ConfigError(*faults.values())
        for job in jobs:
            prepare.keep_credentials(job.cfg)
            job.cfg = prepare.freeze(job.cfg)
        yield hydra, jobs


def _run_one(hydra: Any, job: Any, argv: list[str]) -> int:
    from runner import folders
    from runner.launch import local

    named = any(override.startswith("hydra.run.dir=") for override in job.hydra_config.hydra.overrides.hydra)
    folder, job.cfg = folders.choose(job.cfg, Path(job.folder()), named=named, overrides=job.overrides)
    job.move_to(str(folder))
    return local.launch(_prepared(hydra, job, argv))


def _run_all(hydra: Any, jobs: list[Any], argv: list[str]) -> int:
    from runner import folders, report
    from runner.launch import local

    for job in jobs:
        folders.refuse_foreign(Path(job.folder()))
    rundirs = [_prepared(hydra, job, argv) for job in jobs]
    codes = local.launch_each(rundirs)
    report.sweep(rundirs)
    return next((code for code in (130, 75, 1, 2) if code in codes), 0)


def _prepared(hydra: Any, job: Any, argv: list[str]) -> Any:
    """The run's folder, with Hydra's ``.hydra/`` and our frozen configuration in it."""
    from runner import compose, prepare

    command = ["python", "-m", "runner", *argv]
    entered = compose.enter(hydra, job, lambda _: prepare.prepare(job.cfg, Path(job.folder()), command, job.overrides))
    return entered.return_value


def _ask_hydra(args: Any, argv: list[str]) -> int:
    """--help, --cfg, --info and tab completion are Hydra's own."""
    import hydra

    from runner import compose
    from runner.config import config_dir

    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions come to us
    sys.argv = ["runner", *argv]
    with compose.opened(args) as opened:
        translate = compose.told(opened, args)
    with translate:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=compose.CONFIG_NAME)(lambda _: None)()
    return 0


def _tell(error: RunnerError) -> None:
    if os.environ.get("RUNNER_TRACEBACK"):
        traceback.print_exception(error)
    count = len(error.faults)
    title = "error" if count == 1 else f"{count} errors"
    print(f"{title}: {error}" if count == 1 else f"{title}:\n{error}", file=sys.stderr)
