"""The space that a search looks through: values in Hydra's sweep syntax, as Optuna's distributions.

``a,b,c`` and ``choice(…)`` are categories, ``range(…)`` whole or evenly spaced numbers, ``interval(a,b)`` all numbers
between, ``int(interval(a,b))`` all whole ones; ``tag(log, …)`` looks at their logarithm.
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

from runner.errors import ConfigError, Fault

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Dimension:
    """One key that is searched over."""

    key: str
    text: str
    """Its values as they were written."""
    choices: tuple[str, ...] = ()
    """Ready to stand behind ``key=``; empty for numbers."""
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
        """The values that show whether all of it can be run: each category, or both ends."""
        return list(self.choices) or [written(self.low, self.is_whole), written(self.high, self.is_whole)]

    def override(self, value: Any) -> str:
        """``key=value`` for a value that was proposed."""
        return f"{self.key}={value if self.choices else written(value, self.is_whole)}"


def written(value: float, is_whole: bool) -> str:
    """A number as it stands in an override, and comes back from there as it was."""
    return str(int(value)) if is_whole else repr(float(value))


def dimensions(parser: OverridesParser, swept: Sequence[str], space: dict[str, str]) -> list[Dimension]:
    """The dimensions of the swept overrides of a command line, and of ``search.space``.

    Raises:
        ConfigError: with all that is wrong with them.
    """
    faults: list[Fault] = []
    found: dict[str, Dimension] = {}
    texts = [*swept, *(f"{key}={text}" for key, text in space.items())]
    for text in texts:
        key, _, values = text.partition("=")
        where = key if text in swept else f"search.space.{key}"
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            faults.append(Fault(where, f"cannot be read: {str(error).splitlines()[0]}", SYNTAX, values))
            continue
        faults += [Fault(where, *words, values) for words in _complaints(override, key in found)]
        if not faults:
            found[key] = _dimension(override, key, values)
    if not texts:
        remedy = f"add key=values, {SYNTAX}; in brackets, [4,8], it is one value: a list"
        faults.append(Fault("search", "there is nothing to search over", remedy))
    if faults:
        raise ConfigError(*faults)
    return list(found.values())


SYNTAX = "as optim.learning_rate=tag(log,interval(1e-5,1e-2)), lora.r=4,8,16 or 'seed=range(1,9)'"


def refuse_listed(space: Mapping[str, Any]) -> None:
    """Refuse values of ``search.space`` that are no text in Hydra's sweep syntax.

    Raises:
        ConfigError: with all of them, and how they are written.
    """
    faults = [
        Fault(
            f"search.space.{key}",
            "must be one text, in Hydra's sweep syntax",
            f"write {key}: '{_plainly(value)}'",
            text,
        )
        for key, value in _leaves(space)
        if not isinstance(value, str) and (text := json.dumps(value)) is not None
    ]
    if faults:
        raise ConfigError(*faults)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, and their values: ``{lora: {r: …}}`` is ``lora.r`` too."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plainly(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def explained(error: ConfigError, dimensions: Sequence[Dimension]) -> ConfigError:
    """What is wrong with the ends of a range, once for both; of whole numbers how to draw them alone."""
    fractions = {each.key: each for each in dimensions if not (each.choices or each.is_whole)}
    faults: list[Fault] = []
    for fault in error.faults:
        dimension = fractions.get(fault.key)
        if not dimension or "must be a whole number" not in fault.problem:
            faults.append(fault)
        elif all(known.key != fault.key for known in faults):
            low, high = math.ceil(dimension.low), math.floor(dimension.high)
            draw = f"tag(log,int(interval({low},{high})))" if dimension.is_log else f"range({low},{high + 1})"
            problem = f"{fault.problem}, and there are others in between"
            faults.append(Fault(fault.key, problem, f"write '{fault.key}={draw}'", dimension.text))
    return ConfigError(*faults)


def _complaints(override: Override, is_known: bool) -> Iterator[tuple[str, str]]:
    sweep = override.value()
    if is_known:
        yield "is given twice", "leave one of them out"
    elif not isinstance(sweep, Sweep):
        yield "is one value and no range", SYNTAX
    elif isinstance(sweep, IntervalSweep):
        if sweep.start is None or sweep.end is None or sweep.start == sweep.end:
            yield "has no numbers in it", "give it two ends, the smaller first"
        elif sweep.start > sweep.end:
            yield "has its ends the wrong way round", f"give the smaller first: interval({sweep.end:g},{sweep.start:g})"
        elif "log" in sweep.tags and sweep.start <= 0:
            yield "has no logarithm at its lower end", "let it begin above 0, or leave tag(log, …) out"
    elif "log" in sweep.tags:
        yield "has a logarithm only as an interval", "leave tag(log, …) out, or write interval(low,high)"
    elif isinstance(sweep, RangeSweep) and not list(sweep.range()):
        yield "has no numbers in it", "give the smaller end first; the other does not count"
    if isinstance(sweep, Sweep) and (unknown := sweep.tags - {"log"}):
        yield f"has a tag that says nothing here: {', '.join(sorted(unknown))}", "the one tag is log"


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
