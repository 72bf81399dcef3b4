"""Intervals and tests are those of scipy."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from runner.report import statistics

# Statistics


def test_students_distribution_is_that_of_scipy():
    for freedom in (1, 1.5, 2, 3.7, 9, 40, 1000):
        for t in (0.0, 0.3, 1.0, 2.5, 12.0):
            assert statistics.upper_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)
        for probability in (0.5, 0.8, 0.975, 0.999):
            expected = stats.t.ppf(probability, freedom)
            assert statistics.quantile(probability, freedom) == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_intervals_and_welchs_test_are_those_of_scipy():
    draw = random.Random(0)
    for _ in range(40):
        first = [draw.gauss(0, 1) for _ in range(draw.randint(2, 8))]
        second = [draw.gauss(0.5, 3) for _ in range(draw.randint(2, 8))]
        low, high = stats.t.interval(0.95, len(first) - 1, loc=sum(first) / len(first), scale=stats.sem(first))
        found = statistics.mean(first)
        assert found.half_width is not None
        assert (found.value - found.half_width, found.value + found.half_width) == pytest.approx((low, high))
        assert statistics.welch(first, second) == pytest.approx(stats.ttest_ind(first, second, equal_var=False).pvalue)
        assert statistics.paired(first) == pytest.approx(stats.ttest_1samp(first, 0).pvalue)


def test_one_value_alone_says_nothing_of_the_spread():
    assert statistics.mean([3.0]) == statistics.Mean(1, 3.0, None)
    assert statistics.welch([1.0], [2.0, 3.0]) is None
    assert statistics.welch([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert statistics.welch([1.0, 1.0], [2.0, 2.0]) == 0.0
    assert [statistics.paired(differences) for differences in ([1.0], [0.0, 0.0], [2.0, 2.0])] == [None, 1.0, 0.0]
