"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no schedule state.

Each returns the factor of ``optim.learning_rate`` for optimizer step ``step`` (0 … total - 1). No step has factor 0:
the first step of a warm-up has ``1 / warmup`` (0 in transformers), and the curve ends one step after the last step, so
that the last step still trains if ``min_ratio`` is 0. In other words, the factor of ``step`` of ``total`` equals
transformers' factor of ``step + 1`` of ``total + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Le

from runner.config.bind import bind
from runner.config.schema import Fraction, Whole
from runner.errors import ConfigError, Fault

WarmupSteps = Whole | None
Floor = Annotated[float, Ge(0), Le(1)]


def cosine(step: int, total: int, *, warmup_steps: WarmupSteps, warmup_ratio: Fraction, min_ratio: Floor) -> float:
    """Warm up, then half a cosine down to ``min_ratio`` of the peak (https://arxiv.org/abs/1608.03983)."""
    rise, done = _progress(step, total, warmup(total, warmup_steps, warmup_ratio))
    return rise * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def linear(step: int, total: int, *, warmup_steps: WarmupSteps, warmup_ratio: Fraction, min_ratio: Floor) -> float:
    """Warm up, then a straight line down to ``min_ratio`` of the peak."""
    rise, done = _progress(step, total, warmup(total, warmup_steps, warmup_ratio))
    return rise * (1 - (1 - min_ratio) * done)


def constant(step: int, total: int, *, warmup_steps: WarmupSteps, warmup_ratio: Fraction) -> float:
    """Warm up, then stay at the peak."""
    rise, _ = _progress(step, total, warmup(total, warmup_steps, warmup_ratio))
    return rise


def wsd(
    step: int, total: int, *, warmup_steps: WarmupSteps, warmup_ratio: Fraction, decay_ratio: Floor, min_ratio: Floor
) -> float:
    """Warm up, stay at the peak, and fall linearly over the last ``decay_ratio`` of the run.

    Source: https://arxiv.org/abs/2404.06395 (section 4). ``decay_ratio`` is a fraction of all steps.
    """
    warm = warmup(total, warmup_steps, warmup_ratio)
    decay = round(decay_ratio * total)
    if warm + decay > total:
        raise ConfigError(
            Fault(
                "schedule.decay_ratio",
                f"decay ({decay} steps) plus warm-up ({warm} steps) exceed the {total} steps of the run",
                "lower schedule.decay_ratio or the warm-up, or train more steps",
                decay_ratio,
            )
        )
    rise, _ = _progress(step, total, warm)
    _, done = _progress(step, total, total - decay)
    return rise * (1 - (1 - min_ratio) * done)


def warmup(total: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """Number of warm-up steps: ``warmup_steps``, or ``warmup_ratio`` of ``total`` rounded up as in transformers.

    Raises:
        ConfigError: the warm-up is longer than the run, which would never reach its learning rate.
    """
    steps = math.ceil(total * warmup_ratio) if warmup_steps is None else warmup_steps
    if steps > total:
        raise ConfigError(
            Fault(
                "schedule.warmup_steps",
                f"the warm-up is longer than the run ({total} steps)",
                f"set it to at most {total}, or to null and set schedule.warmup_ratio",
                steps,
            )
        )
    return steps


def check_cosine(*, warmup_steps: int | None, warmup_ratio: float, **_: object) -> Iterator[Fault]:
    if warmup_steps is not None and warmup_ratio > 0:
        yield Fault(
            "warmup_steps",
            f"cannot be combined with warmup_ratio={warmup_ratio}",
            "set schedule.warmup_ratio=0, or schedule.warmup_steps=null",
            warmup_steps,
        )


check_linear = check_constant = check_cosine


def check_wsd(*, warmup_steps: int | None, warmup_ratio: float, decay_ratio: float, **_: object) -> Iterator[Fault]:
    yield from check_cosine(warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)
    if warmup_steps is None and warmup_ratio + decay_ratio > 1:
        yield Fault(
            "decay_ratio",
            f"plus warmup_ratio={warmup_ratio} is more than the whole run",
            "reduce one of them: their sum must be at most 1",
            decay_ratio,
        )


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """A schedule that is longer than the run, as far as the number of steps is known without the data."""
    if (steps := cfg["train"]["max_steps"]) is not None:
        try:
            bind(cfg["schedule"], "schedule")(0, steps)
        except ConfigError as error:
            yield from error.faults


def _progress(step: int, total: int, warm: int) -> tuple[float, float]:
    """(warm-up factor at ``step`` in (0, 1], progress after the warm-up in [0, 1))."""
    at = step + 1
    rise = min(1.0, at / warm) if warm else 1.0
    return rise, max(0.0, (at - warm) / (total + 1 - warm))
