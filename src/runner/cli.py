"""The command line: a bare verb first, or Hydra's grammar. Exit codes: 0, 1 failed, 2 refused, 75, 130."""

from __future__ import annotations

import logging
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package whenever it is imported
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
    except Exception as error:  # a fault of ours, or of the machine: said in a line all the same
        _tell(RunnerError(Fault("", f"{type(error).__name__}: {error}", "RUNNER_TRACEBACK=1 shows where")))
        return 1


def plan(argv: list[str]) -> int:
    """What the run would be, without training it."""
    from runner import folders
    from runner import plan as planning

    if {"-h", "--help"} & set(argv):
        print(planning.HELP)
        return 0
    with composed(argv) as (_, jobs):
        for job in jobs:
            planning.show(folders.configuration(job.cfg, job.overrides))
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
        return _run_all(hydra, jobs, argv) if jobs[0].is_of_sweep else _run_one(hydra, jobs[0], argv)


@contextmanager
def composed(argv: list[str]) -> Iterator[tuple[Any, list[Any]]]:
    """Compose and check every run of a command line, before anything is written; yields (hydra, jobs).

    Raises:
        ConfigError: with the faults of all of them.
    """
    from runner import checks, compose, prepare

    args = compose.parse(argv)
    with compose.opened(args) as hydra:
        jobs = compose.jobs(hydra, args)
        faults: dict[str, Fault] = {}
        for job in jobs:
            prepare.keep_credentials(job.cfg)
            for fault in checks.faults_of(job.cfg):
                faults[str(fault)] = fault
        if faults:
            raise ConfigError(*faults.values())
        for job in jobs:
            job.cfg = prepare.freeze(job.cfg)
        yield hydra, jobs


def _run_one(hydra: Any, job: Any, argv: list[str]) -> int:
    from runner import folders
    from runner.launch import local

    folder, job.cfg = folders.choose(job.cfg, Path(job.folder()), named=job.is_folder_named, overrides=job.overrides)
    folders.refuse(folder, job.cfg)
    return local.launch(_prepared(hydra, job, folder, argv))


def _run_all(hydra: Any, jobs: list[Any], argv: list[str]) -> int:
    from runner import folders, report
    from runner.launch import local

    for job in jobs:  # all of them, before the first is prepared
        folders.refuse_resume(job.cfg)
        folders.refuse(Path(job.folder()), job.cfg)
    rundirs = [_prepared(hydra, job, Path(job.folder()), argv) for job in jobs]
    names = [str(rundir.read_manifest().get("name")) for rundir in rundirs]
    codes = local.launch_each(rundirs)
    report.sweep(names, rundirs, codes)
    if set(codes) == {2}:
        return 2
    return next((code for code in (130, 75) if code in codes), int(any(codes)))


def _prepared(hydra: Any, job: Any, folder: Path, argv: list[str]) -> Any:
    """The run's folder with ``.hydra/`` and our frozen configuration in it; that of an earlier run as it is."""
    from runner import compose, folders, prepare
    from runner.rundir import RunDir

    if RunDir(folder).manifest.exists():
        return RunDir(folder)
    made = folders.make(folder)
    job.move_to(str(folder))
    command = ["python", "-m", "runner", *argv]
    entered = compose.enter(hydra, job, lambda _: prepare.prepare(job.cfg, folder, command, job.overrides, made))
    return entered.return_value


def _ask_hydra(args: Any, argv: list[str]) -> int:
    """--help, --cfg, --info and tab completion are Hydra's own."""
    import hydra

    from runner import compose
    from runner.config import config_dir

    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions come to us
    if args.shell_completion:
        _complete_after_verb()
    sys.argv = ["runner", *argv]
    with compose.opened(args) as opened:
        translate = compose.told(opened, args)
    with translate:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=compose.CONFIG_NAME)(lambda _: None)()
    return 0


def _complete_after_verb() -> None:
    """Hydra completes overrides; a verb before them is none, and is taken out of the line that is completed."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) > 2 and words[1] in VERBS:
        del words[1]
        os.environ["COMP_LINE"] = " ".join(words)
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))


def _tell(error: RunnerError) -> None:
    if os.environ.get("RUNNER_TRACEBACK"):
        traceback.print_exception(error)
    count = len(error.faults)
    title = "error" if count == 1 else f"{count} errors"
    print(f"{title}: {error}" if count == 1 else f"{title}:\n{error}", file=sys.stderr)
