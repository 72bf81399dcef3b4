"""Search space: convert values in Hydra's sweep syntax to Optuna's distributions.

``a,b,c`` and ``choice(…)`` are categories, ``range(…)`` are integers or evenly spaced numbers, ``interval(a,b)`` is a
range of floats, ``int(interval(a,b))`` of integers; ``tag(log, …)`` samples on a logarithmic scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep
from hydra.errors import HydraException

from runner.errors import ConfigError, Fault, first_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Dimension:
    """One key of the search space."""

    key: str
    text: str
    """The values as the user wrote them."""
    choices: tuple[str, ...] = ()
    """Categories in the syntax of overrides (``key=…``); empty for numbers."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    is_whole: bool = False
    is_log: bool = False

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.is_log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.is_log, step=self.step)

    def extremes(self) -> list[str]:
        """Values to check before a search: every category, or both ends of a range."""
        return list(self.choices) or [written(self.low, self.is_whole), written(self.high, self.is_whole)]

    def override(self, value: Any) -> str:
        """``key=value`` for a value that Optuna proposes."""
        return f"{self.key}={value if self.choices else written(value, self.is_whole)}"


def written(value: float, is_whole: bool) -> str:
    """A number in the syntax of overrides, without loss of precision."""
    return str(int(value)) if is_whole else repr(float(value))


def dimensions(parser: OverridesParser, swept: Sequence[str], space: dict[str, str]) -> list[Dimension]:
    """Dimensions from the command line's swept overrides and from ``search.space``.

    Raises:
        ConfigError: all faults of these values.
    """
    faults: list[Fault] = []
    parsed: dict[str, Dimension] = {}
    texts = [*swept, *(f"{key}={text}" for key, text in space.items())]
    for text in texts:
        key, _, values = text.partition("=")
        where = key if text in swept else f"search.space.{key}"
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problem = f"is not valid in Hydra's sweep syntax: {first_line(error)}"
            faults.append(Fault(where, problem, SYNTAX, values))
            continue
        faults += [Fault(where, problem, remedy, values) for problem, remedy in _faults(override, key in parsed)]
        if not faults:
            parsed[key] = _dimension(override, key, values)
    if not texts:
        remedy = f"add key=values, {SYNTAX}; note that [4,8] is a single value, a list"
        faults.append(Fault("search", "the search space is empty", remedy))
    if faults:
        raise ConfigError(*faults)
    return list(parsed.values())


SYNTAX = "for example optim.learning_rate=tag(log,interval(1e-5,1e-2)), lora.r=4,8,16 or 'seed=range(1,9)'"


def refuse_listed(space: Mapping[str, Any]) -> None:
    """Refuse values of ``search.space`` that are not strings, such as lists.

    Raises:
        ConfigError: all such values; the remedy shows the string to write.
    """
    faults: list[Fault] = []
    for key, value in _leaves(space):
        if not isinstance(value, str):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            problem, remedy = "must be a string in Hydra's sweep syntax", f"write {key}: '{text}'"
            faults.append(Fault(f"search.space.{key}", problem, remedy, json.dumps(value)))
    if faults:
        raise ConfigError(*faults)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values: ``{lora: {r: …}}`` yields ``lora.r``."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explained(error: ConfigError, dimensions: Sequence[Dimension]) -> ConfigError:
    """Faults of the values at both ends of a range, as one fault; for integer keys with a remedy to draw integers."""
    fractions = {each.key: each for each in dimensions if not (each.choices or each.is_whole)}
    faults: list[Fault] = []
    for fault in error.faults:
        dimension = fractions.get(fault.key)
        if not dimension or "must be a whole number" not in fault.problem:
            faults.append(fault)
        elif all(other.key != fault.key for other in faults):
            low, high = math.ceil(dimension.low), math.floor(dimension.high)
            draw = f"tag(log,int(interval({low},{high})))" if dimension.is_log else f"range({low},{high + 1})"
            problem = f"{fault.problem}, but this range contains fractions"
            faults.append(Fault(fault.key, problem, f"write '{fault.key}={draw}'", dimension.text))
    return ConfigError(*faults)


def _faults(override: Override, is_known: bool) -> Iterator[tuple[str, str]]:
    """(problem, remedy) for everything that is wrong with the values of a key."""
    sweep = override.value()
    if is_known:
        yield "is set twice", "remove one of them"
    elif not isinstance(sweep, Sweep):
        yield "is a single value, not a range", f"set several values, {SYNTAX}"
    elif isinstance(sweep, IntervalSweep):
        if sweep.start is None or sweep.end is None or sweep.start == sweep.end:
            yield "is an empty range", "set two different ends: interval(low,high)"
        elif sweep.start > sweep.end:
            yield "has its ends in the wrong order", f"put the smaller first: interval({sweep.end:g},{sweep.start:g})"
        elif "log" in sweep.tags and sweep.start <= 0:
            yield "has no logarithm at its lower end", "set a lower end above 0, or remove tag(log, …)"
    elif "log" in sweep.tags:
        yield "cannot use tag(log, …): only intervals can", "remove tag(log, …), or write interval(low,high)"
    elif isinstance(sweep, RangeSweep) and not list(sweep.range()):
        yield "is an empty range", "set the smaller end first: range(start,stop); stop is excluded"
    if isinstance(sweep, Sweep) and (unknown := sweep.tags - {"log"}):
        yield f"has an unknown tag: {', '.join(sorted(unknown))}", "the only tag is log"


def _dimension(override: Override, key: str, text: str) -> Dimension:
    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        is_whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        return Dimension(key, text, (), float(sweep.start), float(sweep.end), None, is_whole, "log" in sweep.tags)
    if isinstance(sweep, RangeSweep):
        values = list(sweep.range())
        is_whole = all(isinstance(value, int) for value in values)
        if len(values) > 1:
            return Dimension(key, text, (), min(values), max(values), abs(float(sweep.step)), is_whole)
    return Dimension(key, text, tuple(str(value) for value in override.sweep_string_iterator()))
