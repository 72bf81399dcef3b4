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
├── Preempted               75  from a scheduler (SIGTERM, SIGUSR2)
├── Pruned                  0   from a search, which may resume the run later
└── Interrupted             130 from the user (Ctrl-C)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

LESS_MEMORY = (
    "use train.micro_batch_size=auto or a smaller one, train.memory=balanced or min, quant=4bit, lora=lora, "
    "or a smaller data.max_length"
)
"""The remedy for a run that is out of memory."""


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
        shown = "" if self.value is ... else f"={_short(self.value)}"
        text = f"{self.key}{shown}: {self.problem}" if self.key else self.problem
        return f"{text}\n    → {self.remedy}" if self.remedy else text


class RunnerError(Exception):
    """A failure that is shown to the user as one message, without a traceback."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


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


def suggest(word: str, allowed: Iterable[str]) -> str:
    """``did you mean 'x'?`` with the most similar word of ``allowed``; an empty string if no word is similar."""
    similar = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"did you mean '{similar[0]}'?" if similar else ""


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
