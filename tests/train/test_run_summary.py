"""What a run prints: the rows that are too long."""

from __future__ import annotations

from conftest import composed

from runner.data.tokenization import DataReport
from runner.train import run_summary
from runner.train.options import Options

OPTIONS = Options({"data": composed()["data"]})


def test_rows_that_are_too_long_are_shown_with_the_limits_that_change_it():
    data = DataReport(truncated=265, longest=1403, longest_of_95_percent=900)
    assert (
        run_summary.too_long(OPTIONS, data) == "265 truncated at data.max_length=256 (none at 1403, at most 5 % at 900)"
    )
    few = DataReport(truncated=2, longest=300, longest_of_95_percent=200)
    assert run_summary.too_long(OPTIONS, few) == "2 truncated at data.max_length=256 (none at 300)"
    dropped = DataReport(dropped=3, longest=300, longest_of_95_percent=300)
    assert run_summary.too_long(OPTIONS, dropped) == "3 dropped at data.max_length=256 (none at 300)"
