"""Curves are thinned without losing a peak."""

from __future__ import annotations

from runner.report import curves


def test_curves_are_thinned_without_losing_a_peak():
    values = [1.0] * 5000
    values[1234], values[4321] = 9.0, -3.0
    curve = curves.Curve(list(range(5000)), [float(n) for n in range(5000)], [float(n) for n in range(5000)], values)
    thin = curve.thinned()
    assert len(thin.values) <= curves.MOST_POINTS + 2
    assert (max(thin.values), min(thin.values)) == (9.0, -3.0)
    assert (thin.steps[0], thin.steps[-1]) == (0, 4999)
    assert thin.steps[thin.values.index(9.0)] == 1234
