"""Runs in trackio's own database."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.mirrored_runs import finish, make_run, outputs

from runner.tracking import metrics_log

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio"),
]
SHOWN = """
import sys
from trackio.sqlite_storage import SQLiteStorage
for log in SQLiteStorage.get_logs("tests", sys.argv[1]):
    print(log["step"], log["train/loss"])
"""


def test_a_resumed_run_has_no_point_twice(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=["trackio"]), range(1, 6), "preempted")
    settings = {**os.environ, "TRACKIO_DIR": str(outputs / "trackio")}  # read when trackio is imported
    follow = [sys.executable, "-m", "runner.mirror", str(rundir.path)]
    subprocess.run(follow, check=True, env=settings)
    metrics_log.rewind(rundir, 3)
    finish(rundir, range(4, 9))
    subprocess.run(follow, check=True, env=settings)
    name = f"run {rundir.read_manifest()['id'][:8]}"
    shown = subprocess.run(
        [sys.executable, "-c", SHOWN, name], check=True, env=settings, capture_output=True, text=True
    ).stdout
    assert shown.splitlines() == [f"{record['step']} {record['train/loss']}" for record in metrics_log.read(rundir)]
