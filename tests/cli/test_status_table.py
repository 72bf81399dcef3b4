"""The lines of the table of ``status``."""

from __future__ import annotations

from pathlib import Path

from runner.cli.status_table import Group, Row, eta_s, table
from runner.tracking import metrics_log
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir


def test_empty_columns_are_left_out_and_a_reason_is_below_its_run(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "one")
    rundir.path.mkdir()
    for record in ({"eval/loss": 3.0}, {"train/loss": 2.5}, {"train/grad_norm": 1.0}):
        metrics_log.append(rundir, {"step": 1, "time": 0.0, **record})
    failed = RunStatus(rundir, "failed", "a NaN", State(status="failed", step=3, total_steps=9, seconds=1.0))
    title, line, reason = table([Row.of_run(failed, "one", indent=False)])
    assert title.split() == ["run", "status", "step", "loss", "folder"]
    assert line.split() == ["one", "failed", "3/9", "2.5000", "train", str(rundir.path)]
    assert reason.strip() == "a NaN"
    assert eta_s(failed) is None


def test_a_sweep_that_is_not_named_is_one_line_with_the_counts(tmp_path: Path) -> None:
    runs = [RunStatus(RunDir(tmp_path / str(n)), status) for n, status in enumerate(["failed", "completed", "failed"])]
    (_, line) = table([Row.of_sweep(Group(SweepDir(tmp_path / "sweep"), runs, is_named=False))])
    assert "sweep/" in line
    assert "1 completed, 2 failed" in line
