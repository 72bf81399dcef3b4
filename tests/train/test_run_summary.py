"""What a run prints: the rows that are too long, and the next commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, composed, prepared

from runner.data.tokenization import DataReport
from runner.tracking.mirror import spawn
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
