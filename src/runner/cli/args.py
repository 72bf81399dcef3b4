"""The words behind a verb: options, ``outputs_dir=…``, and what is left: the runs that are meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from runner import terminal
from runner.errors import ConfigError, Fault, suggest
from runner.tracking import lookup, manifest
from runner.train.trained import Trained, refuse_without_model


@dataclass(frozen=True)
class Args:
    """What was written behind a verb."""

    words: list[str]
    """RUN, SWEEP, FOLDER: everything that is no option."""
    options: dict[str, str]
    """Option → its value; the empty text for one that takes none."""
    outputs_dir: Path

    def has(self, option: str) -> bool:
        return option in self.options

    def number(self, option: str, default: float, *, least: float, whole: bool = True) -> float:
        """The number given with an option.

        Raises:
            ConfigError: it is none, no whole one, or smaller than ``least``.
        """
        text = self.options.get(option)
        if text is None:
            return default
        kind = "whole number" if whole else "number"
        try:
            value = int(text) if whole else float(text)
            if not least <= value < float("inf"):
                raise ValueError
        except ValueError:
            problem = f"must be a {kind} of at least {least:g}"
            raise ConfigError(Fault(option, problem, f"for example {option} {default:g}", text)) from None
        return value


def read(argv: list[str], teaching: str, flags: Collection[str] = (), valued: Collection[str] = ()) -> Args | None:
    """Take the words apart; None where help was asked for, which is printed then.

    ``teaching`` is the text of ``--help``; its first line says how the verb is written. ``flags`` are options without a
    value, ``valued`` those with one (``--rank 1`` or ``--rank=1``).

    Raises:
        ConfigError: with every option that the verb does not know, or that lacks its value.
    """
    if {"-h", "--help"} & set(argv):
        with terminal.piped():
            print(teaching)
        return None
    words: list[str] = []
    options: dict[str, str] = {}
    faults: list[Fault] = []
    outputs_dir, rest = "outputs", iter(argv)
    for option in [option for option in (*valued, "outputs_dir", "uri") if _times(argv, option) > 1]:
        remedy = (
            "give it once: runs of several MLflow stores do not stand side by side"
            if option == "uri"
            else "give it once"
        )
        faults.append(Fault(option, "is given more than once", remedy))
    for word in rest:
        option, has_value, value = word.partition("=")
        if word == "--":  # the rest are words, whatever they begin with
            words += rest
        elif word.startswith("outputs_dir="):
            outputs_dir = value
        elif not word.startswith("-") or word == "-":
            words.append(word)
        elif option in valued:
            options[option] = value if has_value else next(rest, "")
            if not options[option] or options[option].startswith("--"):
                faults.append(Fault(option, "needs a value", teaching.splitlines()[0]))
        elif word in flags:
            options[word] = ""
        else:
            remedy = suggest(word, [*flags, *valued, "--help"]) or teaching.splitlines()[0]
            faults.append(Fault(word, "no such option", remedy))
    if not faults and outputs_dir != "outputs" and not Path(outputs_dir).expanduser().is_dir():
        faults.append(Fault("outputs_dir", "is no folder", "name the folder that the runs lie in", outputs_dir))
    if faults:
        raise ConfigError(*faults)
    return Args(words, options, Path(outputs_dir).expanduser())


def _times(argv: list[str], option: str) -> int:
    """How often an option is given."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    return sum(word == option or word.startswith(f"{option}=") for word in words)


def settings(words: Iterable[str], keys: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Those words that are not ``key=value`` of one of ``keys``, and the values of those that are.

    Raises:
        ConfigError: a key without a value.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    for word in words:
        key, has_value, value = word.partition("=")
        if not has_value or key not in keys:
            rest.append(word)
        elif not value:
            raise ConfigError(Fault(key, "needs a value", f"write {key}=…, or leave it out"))
        else:
            found[key] = value
    return rest, found


def asked_for(words: Args, verb: str, usage: str) -> tuple[Trained, list[str]]:
    """The run that the first word names, and the other words; ``model.path=…`` among them is taken out.

    Raises:
        ConfigError: no RUN, no such run, or one that has no model.
    """
    paths = [word.partition("=")[2] for word in words.words if word.startswith("model.path=")]
    others = [word for word in words.words if not word.startswith("model.path=")]
    if not others:
        raise ConfigError(Fault(verb, "needs a run", usage))
    rundir = lookup.resolve_run(others[0], words.outputs_dir)
    refuse_without_model(rundir)
    cfg = manifest.pinned(manifest.read_config(rundir), rundir)
    return Trained(rundir, cfg, paths[-1] if paths else None), others[1:]
