"""Types of values."""

from __future__ import annotations

from runner.config import schema


def test_divisors() -> None:
    assert schema.divisors(12) == [1, 2, 3, 4, 6, 12]


def test_few_held_out_rows_are_a_warning():
    assert "only 1 row is held out" in schema.few_held_out(1)
    assert "only 9 rows are held out" in schema.few_held_out(9)
    assert schema.few_held_out(10) == schema.few_held_out(None) == ""
