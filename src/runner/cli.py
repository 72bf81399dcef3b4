"""The command line: a bare verb first, or Hydra's grammar. Exit codes: 0, 1 failed, 2 refused, 75, 130."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import console, ranks
from runner.errors import ConfigError, Fault, RunnerError, suggest

if TYPE_CHECKING:
    from runner.launch.joined import Joined
    from runner.launch.protocol import Launcher

Verb = Callable[[list[str]], int]


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


def plan(argv: list[str]) -> int:
    """What the run would be, without training it."""
    from runner import admit, folders
    from runner import plan as planning

    if {"-h", "--help"} & set(argv):
        with console.piped():
            print(planning.HELP)
        return 0
    with composed(argv) as (composer, jobs):
        configurations = [folders.configuration(job.cfg, job.overrides) for job in jobs]
        launchers = admit.by_launcher(configurations)
        for launcher, _ in launchers:
            launcher.check()
        labels = [composer.label(job.overrides) for job in jobs] if len(jobs) > 1 else [""]
        planning.show(zip(labels, configurations, strict=True))
        for launcher, numbers in launchers:
            print(launcher.plan(len(numbers)))
    return 0


def sync(argv: list[str]) -> int:
    """Bring to MLflow what it has not got yet."""
    from runner import mirror

    return mirror.sync_command(argv)


def status(argv: list[str]) -> int:
    """What runs, waits, is done or has died."""
    from runner import status

    return status.status(argv)


def logs(argv: list[str]) -> int:
    """What a run has said, and says."""
    from runner import logs

    return logs.logs(argv)


def cancel(argv: list[str]) -> int:
    """Stop runs, with what was trained saved."""
    from runner import cancel

    return cancel.cancel(argv)


def compare(argv: list[str]) -> int:
    """Which setting was better."""
    from runner import compare

    return compare.compare(argv)


def diff(argv: list[str]) -> int:
    """What two runs were asked for, made of and came to."""
    from runner import diff

    return diff.diff(argv)


def rerun(argv: list[str]) -> int:
    """A run once more, as it was configured."""
    from runner import rerun

    return rerun.rerun(argv)


def ui(argv: list[str]) -> int:
    """MLflow's pages."""
    from runner import ui

    return ui.ui(argv)


def generate(argv: list[str]) -> int:
    """Ask a trained model."""
    from runner import generate

    return generate.generate(argv)


def export(argv: list[str]) -> int:
    """Write a trained model where others find it."""
    from runner import export

    return export.export(argv)


def register(argv: list[str]) -> int:
    """Put a trained model into MLflow's registry."""
    from runner import register

    return register.register(argv)


def evaluate(argv: list[str]) -> int:
    """Measure a trained model on any data."""
    from runner import evaluate

    return evaluate.evaluate(argv)


VERBS: dict[str, Verb] = {
    "plan": plan, "status": status, "logs": logs, "cancel": cancel, "sync": sync, "compare": compare,
    "diff": diff, "rerun": rerun, "ui": ui,
    "generate": generate, "export": export, "register": register, "evaluate": evaluate,
}  # fmt: skip

SHOWING = ("--version", "-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
"""Flags that show something in the place of a run."""

OF_SWEEPS = ("sweep", "search", "launcher.parallel", "launcher.array_parallelism")
"""What keys begin with that mean nothing to one run."""


def may_train(argv: list[str]) -> bool:
    """Whether this process may come to train: it is not asked for a verb's answer, for help, or to show something."""
    if argv and _is_word(argv[0]):
        return argv[0] == "rerun"
    return not set(SHOWING) & set(argv)


def _is_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith(("-", "~", "+"))


def _verb(name: str) -> Verb:
    if name not in VERBS:
        allowed = f"{suggest(name, VERBS)} verbs: {', '.join(VERBS)}; an override is written key=value".strip()
        raise ConfigError(Fault(name, "no such verb", allowed))
    return VERBS[name]


def _version() -> int:
    """Of the runner, and of what it computes with."""
    from runner import provenance

    versions = provenance.versions()
    print("\n".join(f"{name} {versions[name]}" for name in sorted(versions, key=lambda name: name != "runner")))
    return 0


def _refuse_lonely() -> None:
    from runner.launch import joined

    joined.refuse_lonely()


def _among_several(argv: list[str]) -> int:
    """The command line of each process that torchrun or ``accelerate launch`` started: rank 0 does what it asks for."""
    from runner.launch import joined

    return joined.among_several(lambda launcher: _hydra(argv, launcher))


def _hydra(argv: list[str], joined: Joined | None = None) -> int:
    from runner import admit, compose, searching, sweeping

    args = compose.parse(argv)
    if args.multirun and (args.cfg or args.info):
        option, what = ("--cfg", "see the configuration") if args.cfg else ("--info", "ask for it")
        problem = "shows one configuration, and -m means several"
        raise ConfigError(Fault(option, problem, f"leave -m out to {what}", args.cfg or args.info))
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return _ask_hydra(args, argv)
    with compose.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if not _may_sweep(args):
            _refuse_of_sweeps(composer)
        if joined:
            joined.refuse(args.overrides, is_sweep=composer.is_sweep())
        if composer.is_sweep():
            if wanted := searching.asked_for(composer):
                return searching.run(composer, wanted, argv)
            return sweeping.sweep(hydra, args, composer, argv)
        job = composer.single()
        admit.admit([job], joined.processes if joined else None)
        return _run_one(job, argv, joined)


def _may_sweep(args: Any) -> bool:
    """Whether the command line asks for a sweep; where ``hydra.mode`` is given Hydra has to be asked."""
    return args.multirun or any(override.startswith("hydra.mode=") for override in args.overrides)


def _refuse_of_sweeps(composer: Any) -> None:
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


@contextmanager
def composed(argv: list[str]) -> Iterator[tuple[Any, list[Any]]]:
    """Compose and check every run of a command line, before anything is written; yields (composer, jobs).

    Of a search, whose runs are not known, the first of those that stand for its space.

    Raises:
        ConfigError: with the faults of all of them.
    """
    from runner import admit, compose, searching

    args = compose.parse(argv)
    with compose.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if not _may_sweep(args):
            _refuse_of_sweeps(composer)
        if not composer.is_sweep():
            jobs = [composer.single()]
        elif wanted := searching.asked_for(composer):
            yield composer, [searching.planned(composer, wanted)]
            return
        else:
            jobs = composer.jobs(composer.grid(args.overrides))
        admit.admit(jobs)
        yield composer, jobs


def _run_one(job: Any, argv: list[str], joined: Joined | None) -> int:
    from runner import admit, folders, sweeping, sweeps
    from runner.rundir import RunDir

    launcher: Launcher = joined or admit.launcher_of(job.cfg)
    folder, job.cfg = folders.choose(job.cfg, Path(job.folder), named=job.is_folder_named, overrides=job.overrides)
    if not joined and not any(override.startswith("launcher") for override in job.overrides):
        launcher = admit.launcher_of(job.cfg)  # a resumed run goes the way it went
    folders.refuse(folder, job.cfg)
    if RunDir(folder).read_state().status == "completed":
        print(f"{folder} is completed already: nothing to do", file=sys.stderr)
        return 0
    is_new = not job.is_folder_named and not folder.exists()
    launcher.check()
    with sweeps.writing(folder):
        rundir = sweeping.prepared(job, folder, ["python", "-m", "runner", *argv], is_new=is_new)
    rundir.forget_requests()
    return launcher.launch([rundir], None)[0]


def _ask_hydra(args: Any, argv: list[str]) -> int:
    """--help, --cfg, --info and tab completion are Hydra's own."""
    import hydra

    from runner import compose, explain
    from runner.config import config_dir

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
