"""Records go to each tracker once, and one that fails stops nothing else."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from fixtures.event_files import expected, points
from fixtures.mirrored_runs import assert_mirrored, finish, make_run, outputs

from runner.tracking import metrics_log
from runner.tracking.also.sending import Sending
from runner.tracking.mirror import backlog, follow, spawn, sync
from runner.tracking.mlflow.run import MlflowRun

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
ALSO = ["tensorboard"]


def test_a_process_that_follows_sees_the_file_cut_back(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=ALSO), range(1, 6), "running")
    run = MlflowRun.of(rundir)
    sending = Sending(rundir, run.tracking, run.config, run.also)
    assert sending.send(rundir.read_state()) == []
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    metrics_log.rewind(rundir, 3)
    finish(rundir, range(4, 5))
    assert sending.send(rundir.read_state()) == []
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    before = list(rundir.tensorboard.iterdir())
    assert sending.send(rundir.read_state()) == []
    assert list(rundir.tensorboard.iterdir()) == before, "an end is written once"


def test_a_tracker_that_fails_stops_nothing_and_sync_sends_it_later(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=ALSO))
    rundir.tensorboard.write_text("in the way")
    assert follow.follow(rundir) == 0
    assert_mirrored(rundir, "FINISHED")
    problem = spawn.read_report(rundir)["also"]["tensorboard"]
    assert "Error" in problem
    assert backlog.is_behind(rundir)
    (failed,) = sync.sync([rundir.path])
    assert failed.problem == f"tensorboard: {problem}"
    rundir.tensorboard.unlink()
    (synced,) = sync.sync([rundir.path])
    assert (synced.problem, backlog.is_behind(rundir)) == ("", False)
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    before = list(rundir.tensorboard.iterdir())
    sync.sync([rundir.path])
    assert list(rundir.tensorboard.iterdir()) == before, "what is complete is not written again"
