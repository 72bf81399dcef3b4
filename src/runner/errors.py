"""Exceptions of this package, the exit code of each, and the text of an error message.

RunnerError                 exit code 1
├── ConfigError             2   the composed configuration is invalid
├── DataError               2   data is missing, unreadable, malformed, or contains no trained token
├── LaunchError             2   a launcher refused the job
├── ResumeError             2   a run folder cannot be resumed
├── DamagedError            2   a file of a run or sweep folder is lost, cut off or unreadable
├── TrackingError           2   the tracking store is unreachable or misused
│   └── UnknownNameError    2   the store has no experiment, sweep or run of that name
└── TrainingError           1   training itself failed (NaN loss, out of memory, disk full)
Stopped                         not an error: the run received a request to stop
├── Preempted               75  from a scheduler (SIGTERM, SIGUSR1, SIGUSR2) or a closed terminal (SIGHUP)
├── Pruned                  0   from a search, which may resume the run later
└── Interrupted             130 from the user (Ctrl-C)
ReaderLeft                  141 not an error: the reader of the output has left (``| head``); 141 as other programs
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

LESS_MEMORY = (
    "use train.micro_batch_size=auto or a smaller one, train.memory=balanced or min, quant=4bit, lora=lora, "
    "or a smaller data.max_length"
)
"""The remedy for a run that is out of memory."""
LONGEST = 2000
"""Characters of a problem that are shown: it may quote data."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters of terminals and of the direction of writing, and lone surrogates; not newline and tab."""


@dataclass(frozen=True)
class Fault:
    """One error of the user: the config key (or CLI option), its value, the problem, and the remedy."""

    key: str
    problem: str
    remedy: str = ""
    value: object = ...
    """The invalid value; ``...`` if there is no value to show (a missing key, a full disk)."""

    def below(self, prefix: str) -> Fault:
        """The same fault with ``prefix.`` in front of its key."""
        return replace(self, key=".".join(part for part in (prefix, self.key) if part))

    def __str__(self) -> str:
        shown, problem = "" if self.value is ... else f"={_short(self.value)}", _short(self.problem, LONGEST)
        text = f"{self.key}{shown}: {problem}" if self.key else problem
        return visible(f"{text}\n    → {_short(self.remedy, LONGEST)}" if self.remedy else text)


class RunnerError(Exception):
    """A failure that is shown to the user as one message, without a traceback."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        by_remedy: dict[object, list[Fault]] = {}
        for number, fault in enumerate(self.faults):
            by_remedy.setdefault(fault.remedy or number, []).append(fault)
        return "\n".join(
            str(fault if fault is faults[-1] else replace(fault, remedy=""))  # a remedy of several is shown once
            for faults in by_remedy.values()
            for fault in faults
        )


class ConfigError(RunnerError):
    exit_code = 2


class DataError(RunnerError):
    exit_code = 2


class LaunchError(RunnerError):
    exit_code = 2


class ResumeError(RunnerError):
    exit_code = 2


class DamagedError(RunnerError, ValueError):
    """Also a ValueError, as a file with invalid contents is for any other reader."""

    exit_code = 2


class TrackingError(RunnerError):
    exit_code = 2


class UnknownNameError(TrackingError):
    pass


class TrainingError(RunnerError):
    exit_code = 1


def refuse(faults: Iterable[Fault], error: type[RunnerError] = ConfigError) -> None:
    """Raise one error with all these faults, if there are any."""
    if every := tuple(faults):
        raise error(*every)


class Stopped(BaseException):
    """A request to stop the run. A BaseException, so that no ``except Exception`` in a library catches the request."""

    exit_code: int
    status: str
    """The status of the run in state.json."""


class Preempted(Stopped):
    exit_code, status = 75, "preempted"


class Pruned(Stopped):
    exit_code, status = 0, "pruned"


class Interrupted(Stopped):
    exit_code, status = 130, "killed"


class ReaderLeft(BaseException):
    """Ends a command that only prints. A BaseException, as ``Stopped`` is."""

    exit_code = 141


HYDRAS_TRACEBACK = "HYDRA_FULL_ERROR"


def shows_traceback() -> bool:
    """Whether the user wants tracebacks: RUNNER_TRACEBACK, or Hydra's HYDRA_FULL_ERROR, is set and not 0."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("RUNNER_TRACEBACK", HYDRAS_TRACEBACK))


def suggest(word: str, allowed: Iterable[str]) -> str:
    """``did you mean 'x'?`` with the most similar word of ``allowed``; an empty string if no word is similar."""
    similar = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"did you mean '{similar[0]}'?" if similar else ""


def first_line(error: BaseException, most: int | None = 300) -> str:
    """The first line of an error's message, cut to ``most`` characters; its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def typed_line(error: BaseException) -> str:
    """``first_line`` with the type in front; errors of this package go without it."""
    line = first_line(error, None)
    return line if isinstance(error, RunnerError) else f"{type(error).__name__}: {line}"


def visible(text: str) -> str:
    """The text with control characters as escapes (``\\x1b``), so that what it quotes cannot steer the terminal."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def quoted(value: object, limit: int = 60) -> str:
    """A value of the data as Python writes it, short and on one line."""
    return repr(_short(value, limit)) if isinstance(value, str) else _short(repr(value), limit)


def _short(value: object, limit: int = 200) -> str:
    try:
        text = visible(str(value))
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = "a number of more than 4300 digits"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_control(character: str) -> bool:
    """Whether a terminal would obey the character, or no file can hold it (half of a surrogate pair)."""
    return unicodedata.category(character) in ("Cc", "Cs")
