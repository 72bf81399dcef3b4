"""The command line of a verb: its options and ``key=value`` words, each declared once, and its help."""

from __future__ import annotations

import argparse
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import bounds
from runner.errors import ConfigError, Fault, suggest
from runner.files import user_path
from runner.tracking import lookup

if TYPE_CHECKING:
    from runner.train.trained_model import Trained

RUN = "RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id"
WIDTH = 120
"""Characters of a line of the help."""


@dataclass(frozen=True)
class Option:
    """An option or a key of a verb."""

    usage: str
    """``--all``, ``-f, --follow``, ``--rank N`` with a value; ``uri=URI`` for a key."""
    help: str
    kind: Any = str
    """The type of the value, with its bounds."""
    default: Any = None

    @property
    def names(self) -> list[str]:
        """All its names; the last one is that of its value in ``Args``."""
        return [name.split()[0].partition("=")[0] for name in self.usage.split(", ")]

    @property
    def explained(self) -> str:
        """The help, what is allowed, and the default."""
        notes = [bounds.allowed(self.kind)] if self.kind is not str else []
        notes += [f"default: {self.default}"] if self.default is not None else []
        return f"{self.help} ({'; '.join(notes)})" if notes else self.help

    def read(self, texts: list[str] | bool | None, faults: list[Fault]) -> Any:
        """The value from its texts on the command line; what is wrong with them is added to ``faults``."""
        if not isinstance(texts, list):
            return self.default if texts is None else texts
        name, text = self.names[-1], texts[-1]
        value = text if bounds.fits(text, self.kind) else _number(text)
        is_missing = not text or (text.startswith("--") and name.startswith("-"))
        problem = "needs a value" if is_missing else "is given more than once" if len(texts) > 1 else ""
        shown, problem = ... if problem else text, problem or bounds.mismatch(value, self.kind)
        faults += [Fault(name, problem, f"{self.usage}: {self.explained}", shown)] if problem else []
        return value


OUTPUTS_DIR = Option("outputs_dir=FOLDER", "the folder with the runs", default="outputs")
MODEL_PATH = Option("model.path=FOLDER", "the base model, if it was moved since the run")
URI = Option("uri=URI", "the MLflow store with runs whose folders are not on this machine")


OF_MLFLOW = {
    **dict.fromkeys(("--backend-store-uri", "--tracking-uri", "--registry-store-uri"), ("uri=…",)),
    "--experiment-name": ("--experiment",),
}
"""Options of MLflow's commands → what a verb that has it calls it."""


@dataclass(frozen=True)
class Args:
    """The arguments of a verb."""

    words: list[str]
    """All that is not declared: RUN, SWEEP, FOLDER, other key=value."""
    values: dict[str, Any]
    """Option or key → its value, or its default if it is not given."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def outputs_dir(self) -> Path:
        return user_path(self["outputs_dir"], "outputs_dir")


class Verb:
    """The command line of a verb."""

    def __init__(self, synopsis: str, about: str, *options: Option, notes: str = "") -> None:
        """``synopsis``: the verb and its words, ``logs RUN``. Every verb has the key ``outputs_dir``."""
        has_own = any("outputs_dir" in option.names for option in options)
        self.options = options if has_own else (*options, OUTPUTS_DIR)
        self.name, self.about, self.notes = synopsis.split()[0], about, notes
        self.usage = " ".join([f"python -m runner {synopsis}", *(f"[{option.usage}]" for option in self.options)])

    def help(self) -> str:
        """The usage, what the verb does, and a line for each option."""
        width = max(len(option.usage) for option in self.options)
        lines = [f"  {option.usage:<{width}}  {option.explained}" for option in self.options]
        options = "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=" " * (width + 4)) for line in lines)
        usage = textwrap.fill(self.usage, WIDTH, subsequent_indent="    ")
        return "\n\n".join(filter(None, [usage, self.about, options, self.notes]))

    def misused(self, problem: str, value: object = ...) -> ConfigError:
        """The error of a command line with too many or too few words."""
        return ConfigError(Fault(self.name, problem, self.usage, value))

    def read(self, argv: list[str]) -> Args:
        """Parse what follows the verb. All behind ``--`` are words, even if they begin with ``-``.

        Raises:
            ConfigError: with all faults of options and keys.
        """
        end = argv.index("--") if "--" in argv else len(argv)
        names = {name: option.names[-1] for option in self.options for name in option.names}
        given, words, faults = *self._parsed(argv[:end]), []
        for word in list(words):
            name, has_value, text = word.partition("=")
            if name.startswith("-") and word != "-":
                remedy = next((f"write {key}" for key in OF_MLFLOW.get(name, ()) if key.rstrip("=…") in names), "")
                faults.append(Fault(word, "no such option", remedy or suggest(name, [*names, "--help"]) or self.usage))
            elif has_value and name in names:
                words.remove(word)
                given.setdefault(names[name], []).append(text)
        values = {option.names[-1]: option.read(given.get(option.names[-1]), faults) for option in self.options}
        args = Args([*words, *argv[end + 1 :]], values)
        is_default = OUTPUTS_DIR not in self.options or args["outputs_dir"] == OUTPUTS_DIR.default
        if not faults and not is_default and not args.outputs_dir.is_dir():
            remedy = "give the folder that contains the runs"
            faults = [Fault("outputs_dir", "is not a folder", remedy, args["outputs_dir"])]
        if faults:
            raise ConfigError(*faults)
        return args

    def _parsed(self, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
        """(option → its texts, or whether it is given; all other words)"""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        dashed = [option for option in self.options if option.usage.startswith("-")]
        with_value = {name for option in dashed for name in option.names if not option.usage.endswith(option.names[-1])}
        for option in dashed:
            action = "append" if option.names[-1] in with_value else "store_true"
            parser.add_argument(*option.names, dest=option.names[-1], action=action)
        rest = iter(argv)  # argparse takes a value that begins with - only in one word: --sort=-loss
        joined = [f"{word}={next(rest, '')}" if word in with_value else word for word in rest]
        try:
            parsed, words = parser.parse_known_args(joined)
        except argparse.ArgumentError as error:  # no other fault is left to argparse
            raise ConfigError(Fault(str(error.argument_name), "takes no value", self.usage)) from None
        return vars(parsed), words


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def trained_run(verb: Verb, args: Args) -> tuple[Trained, list[str]]:
    """The trained run that the first word names, and the remaining words.

    Raises:
        ConfigError: no RUN, no such run, or a run without a model.
    """
    from runner.tracking import manifest
    from runner.train.trained_model import Trained, refuse_without_model

    if not args.words:
        raise verb.misused("needs a run")
    rundir = lookup.resolve_run(args.words[0], args.outputs_dir)
    refuse_without_model(rundir)
    cfg = manifest.pinned(manifest.read_config(rundir), rundir)
    return Trained(rundir, cfg, args["model.path"]), args.words[1:]
