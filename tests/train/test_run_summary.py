"""What a run prints: the rows that are too long, and the next commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, composed, prepared

from runner.data.tokenization import DataReport
from runner.tracking.mirror import spawn
from runner.tracking.state_file import State
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


def test_the_command_to_upload_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rundir = prepared(tmp_path / "run", *TINY)
    upload, resume = f"python -m runner sync {rundir.path}", f"python -m runner resume={rundir.path}"
    for status, code, lines in (
        ("running", 0, [upload]),
        ("killed", 130, [upload, resume]),
        ("pruned", 0, [upload, resume]),
    ):
        rundir.write_state(status=status)
        run_summary.ending(rundir, spawn.MirrorResult(None, 7, "tracking=offline"), code)
        out = capsys.readouterr().out
        assert "not uploaded to MLflow: 7 records (tracking=offline)" in out
        assert [line.split(maxsplit=1)[1] for line in out.splitlines() if "python -m runner" in line] == lines


@pytest.mark.parametrize(("attempt", "label"), [(1, "time of each part"), (2, "time of each part, this attempt")])
def test_the_times_of_the_parts_are_those_of_one_attempt(attempt: int, label: str):
    numbers = {"steps": 3, "train/tokens": 9, "trained tokens": 5, "training seconds": 780.0}
    summary = {**numbers, "part seconds": {"loading": 2.0, "training": 0.4}}
    rows = dict(run_summary._summary_rows(State("completed", attempt=attempt, summary=summary)))
    assert rows["time"] == "13 min 00 s without loading"
    assert rows[label] == "loading 2.0 s, training 0.4 s"
