"""The command line: a bare verb first, or Hydra's grammar. Exit codes: 0, 1 failed, 2 refused, 75, 130."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli import jobs
from runner.errors import ConfigError, Fault, RunnerError, suggest
from runner.train.distributed import ranks

if TYPE_CHECKING:
    from runner.launch.launcher import Launcher
    from runner.launch.torchrun import Joined


def run(argv: list[str]) -> int:
    """Do what the words ask for; returns the exit code, with a refusal told in one message."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package whenever it is imported
    try:
        if ranks.under_torchrun():
            return _among_several(argv)
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            _refuse_lonely()
        if argv == ["--version"]:
            return _version()
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


VERBS = (
    "plan", "status", "logs", "cancel", "sync", "compare", "diff", "rerun", "ui",
    "generate", "export", "register", "evaluate",
)  # fmt: skip
"""Each is a module of this package with a function ``main(argv)``."""

SHOWING = ("--version", "-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
"""Flags that show something in the place of a run."""


def may_train(argv: list[str]) -> bool:
    """Whether this process may come to train: it is not asked for a verb's answer, for help, or to show something."""
    if argv and _is_word(argv[0]):
        return argv[0] == "rerun"
    return not set(SHOWING) & set(argv)


def _is_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith(("-", "~", "+"))


def _verb(name: str) -> Callable[[list[str]], int]:
    if name not in VERBS:
        allowed = f"{suggest(name, VERBS)} verbs: {', '.join(VERBS)}; an override is written key=value".strip()
        raise ConfigError(Fault(name, "no such verb", allowed))
    verb: Callable[[list[str]], int] = importlib.import_module(f"runner.cli.{name}").main
    return verb


def _version() -> int:
    """Of the runner, and of what it computes with."""
    from runner.tracking import provenance

    versions = provenance.versions()
    print("\n".join(f"{name} {versions[name]}" for name in sorted(versions, key=lambda name: name != "runner")))
    return 0


def _refuse_lonely() -> None:
    from runner.launch import torchrun

    torchrun.refuse_lonely()


def _among_several(argv: list[str]) -> int:
    """The command line of each process that torchrun or ``accelerate launch`` started: rank 0 does what it asks for."""
    from runner.launch import torchrun

    return torchrun.among_several(lambda launcher: _hydra(argv, launcher))


def _hydra(argv: list[str], joined: Joined | None = None) -> int:
    from runner.config import compose
    from runner.launch import prepare
    from runner.sweep import search, session

    args = compose.parse(argv)
    if args.multirun and (args.cfg or args.info):
        option, what = ("--cfg", "see the configuration") if args.cfg else ("--info", "ask for it")
        problem = "shows one configuration, and -m means several"
        raise ConfigError(Fault(option, problem, f"leave -m out to {what}", args.cfg or args.info))
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return _ask_hydra(args, argv)
    with compose.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if not jobs.may_sweep(args):
            jobs.refuse_of_sweeps(composer)
        if joined:
            joined.refuse(args.overrides, is_sweep=composer.is_sweep())
        if composer.is_sweep():
            if wanted := search.asked_for(composer):
                return search.run(composer, wanted, argv)
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
        launcher = prepare.launcher_of(job.cfg)  # a resumed run goes the way it went
    resume.refuse(folder, job.cfg)
    if RunDir(folder).read_state().status == "completed":
        print(f"{folder} is completed already: nothing to do", file=sys.stderr)
        return 0
    is_new = not job.is_folder_named and not folder.exists()
    launcher.check()
    with files.writing(folder):
        rundir = prepare.prepared(job, folder, ["python", "-m", "runner", *argv], is_new=is_new)
    rundir.forget_requests()
    return launcher.launch([rundir], None)[0]


def _ask_hydra(args: Any, argv: list[str]) -> int:
    """--help, --cfg, --info and tab completion are Hydra's own."""
    import hydra

    from runner.config import compose, explain
    from runner.config.bind import config_dir

    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions come to us
    if args.shell_completion:
        _complete_after_verb()
    sys.argv = ["runner", *argv]
    with compose.opened(args) as opened:
        translate = explain.told(opened, args)
    with translate:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=explain.CONFIG_NAME)(lambda _: None)()
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
