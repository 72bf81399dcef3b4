"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no schedule state.

Each returns the factor on ``optim.learning_rate`` for optimizer step ``step`` (0 … total - 1). No step is wasted: in
transformers the first step of a warm-up has the factor 0; here it has ``1 / warmup``, and the end of the curve lies
just behind the last step, so that this one still learns where ``min_ratio`` is 0. In other words, the factor of
``step`` of ``total`` is transformers' of ``step + 1`` of ``total + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge, Le

from runner.config.schema import Fraction
from runner.errors import ConfigError, Fault

WarmupSteps = Annotated[int, Ge(0)] | None
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

    Source: https://arxiv.org/abs/2404.06395 (section 4). ``decay_ratio`` is a part of all steps, rounded to whole ones.
    """
    warm = warmup(total, warmup_steps, warmup_ratio)
    decay = round(decay_ratio * total)
    if warm + decay > total:
        raise ConfigError(
            Fault(
                "schedule.decay_ratio",
                f"the decay ({decay} steps) and the warm-up ({warm}) do not fit into {total} steps",
                "lower schedule.decay_ratio or the warm-up, or train for more steps",
                decay_ratio,
            )
        )
    rise, _ = _progress(step, total, warm)
    _, done = _progress(step, total, total - decay)
    return rise * (1 - (1 - min_ratio) * done)


def warmup(total: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """The steps of the warm-up: as given, or ``warmup_ratio`` of ``total`` rounded up as transformers does.

    Raises:
        ConfigError: a warm-up longer than the run, which would never reach its learning rate.
    """
    steps = math.ceil(total * warmup_ratio) if warmup_steps is None else warmup_steps
    if steps > total:
        raise ConfigError(
            Fault(
                "schedule.warmup_steps",
                f"the run has {total} steps: it would end before its warm-up does",
                f"set it to {total} or less, or to null and give schedule.warmup_ratio",
                steps,
            )
        )
    return steps


def check_cosine(*, warmup_steps: int | None, warmup_ratio: float, min_ratio: float) -> Iterator[Fault]:
    return _two_warmups(warmup_steps, warmup_ratio)


def check_linear(*, warmup_steps: int | None, warmup_ratio: float, min_ratio: float) -> Iterator[Fault]:
    return _two_warmups(warmup_steps, warmup_ratio)


def check_constant(*, warmup_steps: int | None, warmup_ratio: float) -> Iterator[Fault]:
    return _two_warmups(warmup_steps, warmup_ratio)


def check_wsd(
    *, warmup_steps: int | None, warmup_ratio: float, decay_ratio: float, min_ratio: float
) -> Iterator[Fault]:
    yield from _two_warmups(warmup_steps, warmup_ratio)
    if warmup_steps is None and warmup_ratio + decay_ratio > 1:
        yield Fault(
            "decay_ratio",
            f"together with warmup_ratio={warmup_ratio} it is more than the whole run",
            "let the two add up to at most 1",
            decay_ratio,
        )


def _two_warmups(warmup_steps: int | None, warmup_ratio: float) -> Iterator[Fault]:
    if warmup_steps is not None and warmup_ratio > 0:
        yield Fault(
            "warmup_steps",
            f"is given together with warmup_ratio={warmup_ratio}; only one of the two can hold",
            "set schedule.warmup_ratio=0, or leave schedule.warmup_steps at null",
            warmup_steps,
        )


def _progress(step: int, total: int, warm: int) -> tuple[float, float]:
    """How far the warm-up has risen at ``step`` (0 … 1], and how much of what follows it is done [0 … 1)."""
    at = step + 1
    rise = min(1.0, at / warm) if warm else 1.0
    return rise, max(0.0, (at - warm) / (total + 1 - warm))
