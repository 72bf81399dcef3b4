"""The command line: a verb with its arguments, or Hydra's overrides (train or sweep).

Exit codes: 0 completed, 1 failed, 2 refused, 75 preempted, 130 interrupted, 141 the reader of the output has left.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import environment_variables, streams
from runner.cli import jobs
from runner.errors import HYDRAS_TRACEBACK, ConfigError, Fault, ReaderLeft, RunnerError, shows_traceback, suggest
from runner.train.distributed import ranks

if TYPE_CHECKING:
    from runner.launch.launcher import Launcher
    from runner.launch.torchrun import Joined


@streams.guarded()
def run(argv: list[str]) -> int:
    """Run a command line and return its exit code. Errors are printed as one message, without a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about an optional package at import
    try:
        if ranks.under_torchrun() or "ACCELERATE_MIXED_PRECISION" in os.environ:
            from runner.launch import torchrun

            if ranks.under_torchrun():  # rank 0 reads the command line, the other ranks follow it
                return torchrun.among_several(lambda launcher: _hydra(argv, launcher))
            torchrun.refuse_lonely()
        if argv == ["--version"]:
            return _version()
        if argv and _is_bare_word(argv[0]):
            return _run_verb(*argv)
        return _hydra(argv)
    except RunnerError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ReaderLeft as error:
        return error.exit_code
    except Exception as error:  # a bug, or a failure of the machine
        remedy = "set RUNNER_TRACEBACK=1 to see the traceback"
        _print_error(RunnerError(Fault("", f"{type(error).__name__}: {error}", remedy)))
        return 1


VERBS = (
    "plan", "status", "logs", "cancel", "sync", "compare", "diff", "rerun", "ui",
    "generate", "export", "register", "evaluate",
)  # fmt: skip
"""Each verb is a module of this package with its command line, ``VERB``, and a function ``main(argv)``."""

INFO_FLAGS = ("--version", "-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
"""Flags that print information instead of starting a run."""


def may_train(argv: list[str]) -> bool:
    """Whether this command line may train: overrides without an information flag, or the verb ``rerun``."""
    if argv and _is_bare_word(argv[0]):
        return argv[0] == "rerun"
    return not set(INFO_FLAGS) & set(argv)


def _is_bare_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith(("-", "~", "+"))


def _run_verb(name: str, *argv: str) -> int:
    if name not in VERBS:
        from runner.config import synonyms

        hint = f"{answer};" if (answer := synonyms.word_hint(name)) else suggest(name, VERBS)
        allowed = f"{hint} verbs: {', '.join(VERBS)}; an override is written key=value".strip()
        raise ConfigError(Fault(name, "no such verb", allowed))
    verb = importlib.import_module(f"runner.cli.{name}")
    if {"-h", "--help"} & set(takewhile(lambda word: word != "--", argv)):
        with streams.piped():
            print(verb.VERB.help())
        return 0
    return int(verb.main(list(argv)))


@streams.piped()
def _version() -> int:
    """Print the versions of the runner and of the libraries that it computes with."""
    from runner.tracking import provenance

    versions = provenance.versions()
    print("\n".join(f"{name} {versions[name]}" for name in sorted(versions, key=lambda name: name != "runner")))
    return 0


def _hydra(argv: list[str], joined: Joined | None = None) -> int:
    from runner.config import command_line, compose
    from runner.launch import prepare, torchrun
    from runner.sweep import search, session

    args = command_line.parse(argv)
    if args.multirun and (args.cfg or args.info):
        option = "--cfg" if args.cfg else "--info"
        problem = "shows one configuration, but -m composes several"
        raise ConfigError(Fault(option, problem, "leave -m out", args.cfg or args.info))
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return _show_with_hydra(args, argv)
    torchrun.refuse_srun()
    with command_line.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if not jobs.may_sweep(args):
            jobs.refuse_sweep_keys(composer)
        if joined:
            joined.refuse(args.overrides, is_sweep=composer.is_sweep())
        if composer.is_sweep():
            if settings := search.chosen_by(composer):
                return search.run(composer, settings, argv)
            return session.sweep(hydra, args, composer, argv)
        job = composer.single()
        prepare.admit([job], joined.processes if joined else None)
        return _run_one(job, argv, joined)


def _run_one(job: Any, argv: list[str], joined: Joined | None) -> int:
    from runner import files
    from runner.launch import prepare
    from runner.tracking import resume
    from runner.tracking.rundir import RunDir

    launcher: Launcher = joined or prepare.launcher_of(job.cfg)
    folder, job.cfg = resume.choose(job.cfg, Path(job.folder), named=job.is_folder_named, overrides=job.overrides)
    if not joined and not any(override.startswith("launcher") for override in job.overrides):
        launcher = prepare.launcher_of(job.cfg)  # a resumed run keeps its own launcher
    resume.refuse(folder, job.cfg)  # also rebuilds a damaged state.json
    if RunDir(folder).read_state().status == "completed":
        print(f"{folder} is completed already: nothing to do", file=sys.stderr)
        return 0
    is_new = not job.is_folder_named and not folder.exists()
    launcher.check()
    with files.writing(folder):
        rundir = prepare.prepared(job, folder, ["python", "-m", "runner", *argv], is_new=is_new)
    rundir.forget_requests()
    return launcher.launch([rundir], None)[0]


@streams.piped()
def _show_with_hydra(args: Any, argv: list[str]) -> int:
    """Let Hydra handle --help, --cfg, --info and tab completion."""
    import hydra

    from runner.config import command_line, hydra_errors
    from runner.config.bind import config_dir

    if args.shell_completion:
        _complete_verbs()
    sys.argv = ["runner", *argv]
    with command_line.opened(args) as opened:
        translate = hydra_errors.as_config_errors(opened, args)
    with (
        translate,
        environment_variables.kept(HYDRAS_TRACEBACK, "1"),
    ):  # Hydra raises its errors instead of printing them
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=hydra_errors.CONFIG_NAME)(
            lambda _: None
        )()
    return 0


def _complete_verbs() -> None:
    """Print the verbs for the first word; after a verb, remove it from the line that Hydra completes."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) == 2:
        print("\n".join(verb for verb in VERBS if verb.startswith(words[1])))
    elif len(words) > 2 and words[1] in VERBS:
        del words[1]
        os.environ["COMP_LINE"] = " ".join(words)
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))


def _print_error(error: RunnerError) -> None:
    if shows_traceback():
        traceback.print_exception(error)
    count = len(error.faults)
    print(f"error: {error}" if count == 1 else f"{count} errors:\n{error}", file=sys.stderr)
