"""What can go wrong, and how it is said.

RunnerError                 exit code 1
├── ConfigError             2   the composed configuration cannot be run as it stands
├── DataError               2   data is missing, unreadable, malformed, or would train nothing
├── LaunchError             2   a launcher refused the job
├── ResumeError             2   a run folder cannot be taken up again
├── TrackingError           2   the tracking store cannot be used as asked
│   └── UnknownNameError    2   it has no experiment, sweep or run of that name
└── TrainingError           1   training itself failed (a NaN loss, no memory, no space left)
Stopped                         not an error: the run was asked to stop
├── Preempted               75  by SIGTERM (a scheduler)
├── Pruned                  0   by a search, which may take it up again
└── Interrupted             130 by Ctrl-C (the user)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

LESS_MEMORY = (
    "use train.micro_batch_size=auto or a smaller one, train.memory=balanced or min, quant=4bit, lora=lora, "
    "or a smaller data.max_length"
)
"""The remedy where memory does not suffice."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, what stands there, what is allowed, and what to do."""

    key: str
    problem: str
    remedy: str = ""
    value: object = ...
    """The offending value; ``...`` when there is none to show (a missing key, a fault of the machine)."""

    def below(self, prefix: str) -> Fault:
        """The same fault, with its key seen from further up the tree."""
        return replace(self, key=".".join(part for part in (prefix, self.key) if part))

    def __str__(self) -> str:
        shown = "" if self.value is ... else f"={_short(self.value)}"
        text = f"{self.key}{shown}: {self.problem}" if self.key else self.problem
        return f"{text}\n    → {self.remedy}" if self.remedy else text


class RunnerError(Exception):
    """A failure that is told to the user in one message, without a traceback."""

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


class TrackingError(RunnerError):
    exit_code = 2


class UnknownNameError(TrackingError):
    pass


class TrainingError(RunnerError):
    exit_code = 1


class Stopped(BaseException):
    """A request to stop, on its way to whom it concerns: no ``except Exception`` of a library may eat it."""

    exit_code: int
    status: str
    """What state.json says of a run that ended so."""


class Preempted(Stopped):
    exit_code, status = 75, "preempted"


class Pruned(Stopped):
    exit_code, status = 0, "pruned"


class Interrupted(Stopped):
    exit_code, status = 130, "killed"


def suggest(word: str, allowed: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest of ``allowed``, or an empty string where nothing is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
