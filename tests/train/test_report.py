"""What the header says about rows that are too long, and about a held-out split that is too small."""

from __future__ import annotations

from runner.data.dataset import DataReport
from runner.train import report

CFG = {"data": {"max_length": 256}}


def test_rows_that_are_too_long_are_shown_with_the_limits_that_change_it():
    data = DataReport(truncated=265, longest=1403, longest_of_95_percent=900)
    assert report.too_long(CFG, data) == "265 truncated at data.max_length=256 (none at 1403, at most 5 % at 900)"
    few = DataReport(truncated=2, longest=300, longest_of_95_percent=200)
    assert report.too_long(CFG, few) == "2 truncated at data.max_length=256 (none at 300)"
    dropped = DataReport(dropped=3, longest=300, longest_of_95_percent=300)
    assert report.too_long(CFG, dropped) == "3 dropped at data.max_length=256 (none at 300)"
