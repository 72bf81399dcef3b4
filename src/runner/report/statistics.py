"""What a few repetitions allow one to say: a mean with its confidence interval, and whether two means differ.

Student's distribution is computed here, as importing scipy takes longer than everything else that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of ``n`` values and half the width of its confidence interval."""

    n: int
    value: float
    half_width: float | None
    """None where one value alone says nothing of the spread."""


def mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """The mean with its interval by Student's t: it holds the true mean in 95 of 100 such experiments."""
    n = len(values)
    if n < 2:
        return Mean(n, fmean(values), None)
    half_width = quantile((1 + confidence) / 2, n - 1) * math.sqrt(variance(values) / n)
    return Mean(n, fmean(values), half_width)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p of Welch's t-test, which takes no equal variances for granted; None with less than two values each.

    How likely means at least so far apart would be if both samples came from the same distribution.
    """
    if min(len(first), len(second)) < 2:
        return None
    parts = [variance(values) / len(values) for values in (first, second)]
    apart, spread = abs(fmean(first) - fmean(second)), sum(parts)
    if spread == 0:
        return 1.0 if apart == 0 else 0.0
    freedom = spread**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return 2 * upper_tail(apart / math.sqrt(spread), freedom)


def upper_tail(t: float, freedom: float) -> float:
    """P(T > t) for t >= 0 and Student's distribution with ``freedom`` degrees (Abramowitz & Stegun 26.7.1)."""
    return 0.5 * _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def quantile(probability: float, freedom: float) -> float:
    """The t below which a variable of Student's distribution falls with this probability (0.5 and above)."""
    low, high = 0.0, 1.0
    while upper_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if upper_tail(middle, freedom) > 1 - probability else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function (Abramowitz & Stegun 26.5.8), by the side that converges faster."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float, tiny: float = 1e-300) -> float:
    """The continued fraction 1 + d1/(1 + d2/(1 + …)) of 26.5.8, evaluated from the front (Lentz's method)."""
    value = c = 1.0
    d = 0.0
    for number in range(1, 10_000):
        m = number // 2
        if number % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
