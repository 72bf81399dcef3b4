"""The table of runs at work."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.queued_sweeps import ended, played_sweep, queue

from runner.launch import progress_table


def test_the_board_follows_runs_that_others_work_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    sweep = played_sweep(tmp_path, "sleep 1", "fail")
    sweep.rundirs()[1].write_state(status="killed", reason="in an earlier attempt")
    process = queue(sweep, parallel=1, how="imitate")
    progress_table.follow(sweep.rundirs(), lambda: process.poll() is not None)
    ended(process)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[")]
    assert said[:2] == ["[1/2] sleep 1: started", said[1]]
    assert said[1].startswith("[1/2] sleep 1: completed")
    assert said[-1].startswith("[2/2] fail: failed")
    assert "earlier" not in "".join(said)


def test_a_search_counts_what_it_will_propose_and_a_run_that_goes_on_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    rundirs = played_sweep(tmp_path, "a", "b").rundirs()
    shown = progress_table.ProgressTable(rundirs[:1], at_once=1, total=4)
    shown.started(0)
    shown.ended(0, "pruned", "paused at step 3")
    assert shown.add(rundirs[1]) == 1
    (rundirs[0].checkpoints / "step-000003").mkdir(parents=True)
    assert shown.add(rundirs[0]) == 0, "the same run again"
    shown.started(0)
    said = [line.partition(" after")[0] for line in capfd.readouterr().err.splitlines()]
    assert said == ["[1/4] a: started", "[1/4] a: pruned", "[1/4] a: resumes from step 3"]
    assert shown.summary() == "0/4 done"


def test_the_time_left_counts_what_runs_and_what_waits(tmp_path: Path):
    rundirs = played_sweep(tmp_path, "a", "b", "c", "d").rundirs()
    shown = progress_table.ProgressTable(rundirs, at_once=1)
    assert shown.summary() == "0/4 done"
    shown.started(0)
    rundirs[0].write_state(status="running", step=10, total_steps=20, seconds=50.0)
    shown.refresh()
    assert shown.summary().startswith("0/4 done, about 3 min")
    written, ahead = rundirs[0].read_state(), time.time() + 3600
    assert replace(written, updated=ahead).remaining_s() == 50.0, "written by a machine whose clock is ahead"
    shown.ended(0, "failed", "x")
    assert shown.summary().startswith("1/4 done")
