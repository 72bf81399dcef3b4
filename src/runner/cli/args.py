"""Parse the arguments of a verb: options, ``outputs_dir=…`` and the remaining words, which usually name runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from runner import streams
from runner.errors import ConfigError, Fault, suggest
from runner.tracking import lookup

if TYPE_CHECKING:
    from runner.train.trained import Trained


@dataclass(frozen=True)
class Args:
    """The parsed arguments of a verb."""

    words: list[str]
    """Arguments that are not options: RUN, SWEEP, FOLDER, key=value."""
    options: dict[str, str]
    """Option → its value; an empty string for an option without a value."""
    outputs_dir: Path

    def has(self, option: str) -> bool:
        return option in self.options

    def number(self, option: str, default: float, *, least: float, whole: bool = True) -> float:
        """The value of an option as a number; ``default`` if the option is not given.

        Raises:
            ConfigError: not a (whole) number, or smaller than ``least``.
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


def read(argv: list[str], usage: str, flags: Collection[str] = (), valued: Collection[str] = ()) -> Args | None:
    """Parse the arguments of a verb. With ``--help``: print ``usage`` and return None.

    ``usage`` is the help text; its first line is the synopsis. ``flags`` are options without a value, ``valued``
    options with one (``--rank 1`` or ``--rank=1``).

    Raises:
        ConfigError: unknown options, options without their value, or options given twice (all of them at once).
    """
    if {"-h", "--help"} & set(argv):
        with streams.piped():
            print(usage)
        return None
    words: list[str] = []
    options: dict[str, str] = {}
    faults: list[Fault] = []
    outputs_dir, rest = "outputs", iter(argv)
    counts = Counter(word.partition("=")[0] for word in takewhile(lambda word: word != "--", argv))
    for option in [option for option in (*valued, "outputs_dir", "uri") if counts[option] > 1]:
        remedy = "give it once: a command reads one MLflow store" if option == "uri" else "give it once"
        faults.append(Fault(option, "is given more than once", remedy))
    for word in rest:
        option, has_value, value = word.partition("=")
        if word == "--":  # everything after -- is a word, even if it begins with -
            words += rest
        elif word.startswith("outputs_dir="):
            outputs_dir = value
        elif not word.startswith("-") or word == "-":
            words.append(word)
        elif option in valued:
            options[option] = value if has_value else next(rest, "")
            if not options[option] or options[option].startswith("--"):
                faults.append(Fault(option, "needs a value", usage.splitlines()[0]))
        elif word in flags:
            options[word] = ""
        else:
            remedy = suggest(word, [*flags, *valued, "--help"]) or usage.splitlines()[0]
            faults.append(Fault(word, "no such option", remedy))
    if not faults and outputs_dir != "outputs" and not (outputs_dir and Path(outputs_dir).expanduser().is_dir()):
        faults.append(Fault("outputs_dir", "is not a folder", "give the folder that contains the runs", outputs_dir))
    if faults:
        raise ConfigError(*faults)
    return Args(words, options, Path(outputs_dir).expanduser())


def settings(words: Iterable[str], keys: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Split off ``key=value`` words: returns (the other words, the values of ``keys``).

    Raises:
        ConfigError: a key without a value.
    """
    rest: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        key, has_value, value = word.partition("=")
        if not has_value or key not in keys:
            rest.append(word)
        elif not value:
            raise ConfigError(Fault(key, "needs a value", f"write {key}=…, or leave it out"))
        else:
            values[key] = value
    return rest, values


def trained_run(words: Args, verb: str, synopsis: str) -> tuple[Trained, list[str]]:
    """The trained run that the first word names, and the remaining words without ``model.path=…``.

    Raises:
        ConfigError: no RUN, no such run, or a run without a model.
    """
    from runner.tracking import manifest
    from runner.train.trained import Trained, refuse_without_model

    paths = [word.partition("=")[2] for word in words.words if word.startswith("model.path=")]
    others = [word for word in words.words if not word.startswith("model.path=")]
    if not others:
        raise ConfigError(Fault(verb, "needs a run", synopsis))
    rundir = lookup.resolve_run(others[0], words.outputs_dir)
    refuse_without_model(rundir)
    cfg = manifest.pinned(manifest.read_config(rundir), rundir)
    return Trained(rundir, cfg, paths[-1] if paths else None), others[1:]
