"""The table at the end of a sweep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import TINY, prepared

from runner.sweep import table
from runner.tracking.state_file import DIED


def test_the_table_of_a_sweep_shows_the_current_status_not_that_of_dead_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rundir = prepared(tmp_path / "run", *TINY)
    rundir.write_state(status="running", attempt=1, host=os.uname().nodename)
    table.sweep([("seed=1", rundir)], is_detached=False)
    shown = capsys.readouterr().out
    assert f"killed  seed=1: {DIED}" in shown
    assert "running" not in shown
    assert "the same command again" in shown
