"""Types of values."""

from __future__ import annotations

from runner.config.schema import divisors


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
