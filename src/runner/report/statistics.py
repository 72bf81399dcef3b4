"""Means with confidence intervals, and Welch's t-test.

Student's t distribution is implemented here because importing scipy takes longer than the whole command.
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
    """None for a single value."""


def mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """The mean with its confidence interval (Student's t): 95 % of such intervals contain the true mean."""
    n = len(values)
    if n < 2:
        return Mean(n, fmean(values), None)
    half_width = quantile((1 + confidence) / 2, n - 1) * math.sqrt(variance(values) / n)
    return Mean(n, fmean(values), half_width)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p value of Welch's t-test (variances may differ); None if a sample has fewer than two values."""
    if min(len(first), len(second)) < 2:
        return None
    parts = [variance(values) / len(values) for values in (first, second)]
    difference, total = abs(fmean(first) - fmean(second)), sum(parts)
    if total == 0:
        return 1.0 if difference == 0 else 0.0
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return 2 * upper_tail(difference / math.sqrt(total), freedom)


def paired(differences: Sequence[float]) -> float | None:
    """The two-sided p value of the paired t-test (the true mean of the differences is 0); None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean, spread = abs(fmean(differences)), variance(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * upper_tail(mean / math.sqrt(spread / n), n - 1)


def upper_tail(t: float, freedom: float) -> float:
    """P(T > t) for t >= 0, T of Student's t distribution with ``freedom`` degrees (Abramowitz & Stegun 26.7.1)."""
    return 0.5 * _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution for a probability of at least 0.5, by bisection."""
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
    """The regularised incomplete beta function (Abramowitz & Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the symmetric form converges faster there
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
