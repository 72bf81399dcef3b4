"""Callbacks: functions of the user's that follow a run, named by ``train.callbacks``.

``f(event, step, metrics, folder)``, with any of these parameters. The events are ``start``, ``step`` (training metrics
were recorded: ``train.logging_steps``), ``evaluation``, ``save`` (a checkpoint is about to be written) and ``end`` (the
model is saved). ``metrics`` is a copy of the latest value of each metric, ``folder`` the run folder. Rank 0 calls them;
they cannot change the training, and one that raises an exception fails the run.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import user_function
from runner.config.combinations import CALLBACKS
from runner.errors import ConfigError, Fault, TrainingError, suggest

if TYPE_CHECKING:
    from runner.train.parts import Hooks

PARAMETERS = ("event", "step", "metrics", "folder")
SLOW_SHARE, SLOW_S = 0.1, 1.0
"""Share of the time since the start, and seconds, from which a callback is reported as slow."""
log = logging.getLogger("runner")


def load(names: Sequence[str], code: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """``file.py:name`` → the function; its parameters are checked.

    Raises:
        ConfigError: a function cannot be imported, or needs another parameter.
    """
    functions = {name: user_function.load(CALLBACKS, name, tuple(code)) for name in names}
    faults = [fault for name, function in functions.items() for fault in _faults(name, function)]
    if faults:
        raise ConfigError(*faults)
    return functions


@dataclass
class Callbacks:
    """The callbacks of an attempt at a run."""

    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    folder: Path = Path()
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest value of each metric."""
    now: Callable[[], float] = time.monotonic
    _seconds: dict[str, float] = field(default_factory=dict)
    _began: float | None = None
    _warned: bool = False

    def follow(self, hooks: Hooks) -> Hooks:
        """The hooks of the loop, which call the callbacks after everything else."""

        def record(step: int, metrics: dict[str, float]) -> None:
            hooks.record(step, metrics)
            is_evaluation = any(name.startswith("eval/") for name in metrics)
            self.call("evaluation" if is_evaluation else "step", step, metrics)

        def saving(step: int) -> None:
            hooks.saving(step)
            self.call("save", step)

        return replace(hooks, record=record, saving=saving)

    def call(self, event: str, step: int, metrics: dict[str, float] | None = None) -> None:
        """Call each callback.

        Raises:
            TrainingError: one has failed.
        """
        self.metrics |= metrics or {}
        if self._began is None:
            self._began = self.now()
        for name, function in self.functions.items():
            given = {"event": event, "step": step, "metrics": dict(self.metrics), "folder": self.folder}
            before = self.now()
            try:
                function(**{key: given[key] for key in _accepted(function)})
            except (Exception, SystemExit) as error:
                problem = f"{name} failed at {event}, step {step}: {type(error).__name__}: {error}"
                problem += user_function.place_of(error)
                remedy = "correct the function and start a new run: this one keeps its copy of the code"
                raise TrainingError(Fault(CALLBACKS, problem, remedy)) from error
            self._seconds[name] = self._seconds.get(name, 0.0) + self.now() - before
        self._warn_if_slow()

    def _warn_if_slow(self) -> None:
        assert self._began is not None
        passed = self.now() - self._began
        name, seconds = max(self._seconds.items(), key=lambda pair: pair[1], default=("", 0.0))
        if not self._warned and seconds > max(SLOW_S, SLOW_SHARE * passed):
            self._warned = True
            log.warning(f"{CALLBACKS}: {name} took {seconds / passed:.0%} of the time so far ({seconds:.1f} s)")


def _faults(name: str, function: Callable[..., Any]) -> list[Fault]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p for p in _parameters(function).values() if p.default is p.empty and not p.kind.name.startswith("VAR_")]
    unknown = [p.name for p in needed if p.name not in PARAMETERS or p.kind not in named]
    remedy = f"a callback has any of the parameters {', '.join(PARAMETERS)}"
    return [
        Fault(CALLBACKS, f"its parameter '{each}' is unknown. {suggest(each, PARAMETERS)}".strip(" ."), remedy, name)
        for each in unknown
    ]


def _accepted(function: Callable[..., Any]) -> Sequence[str]:
    """The names of what the function is given."""
    parameters = _parameters(function)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return PARAMETERS if takes_all else [name for name in PARAMETERS if name in parameters]


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)
