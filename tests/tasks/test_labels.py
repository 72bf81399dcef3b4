"""The order of classes that are read from the data."""

from __future__ import annotations

from runner.tasks import labels


def test_numbers_are_ordered_by_value_before_texts() -> None:
    names = ["b", "10", "9", "--5", "-1", "-", "a", "+2", "9" * 5000]
    assert sorted(names, key=labels.order) == ["-1", "9", "10", "+2", "-", "--5", "9" * 5000, "a", "b"]
