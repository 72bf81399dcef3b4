"""sync brings to MLflow what is not there."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from fixtures.mirrored_runs import Server, assert_mirrored, finish, make_run, outputs

from runner.errors import ConfigError
from runner.tracking.mirror import sync
from runner.tracking.mlflow.run import DIED


def test_sync_of_offline_dead_and_broken_runs(outputs: Path) -> None:
    offline = {
        "_target_": "runner.tracking.trackers.offline",
        "experiment": "later",
        "run_name": "named",
        "log_model": False,
    }
    done, dead, waiting, broken, elsewhere = (make_run(outputs, name) for name in ("a", "b", "c", "d", "e"))
    for rundir in (done, dead):
        config = yaml.safe_load(rundir.config.read_text())
        rundir.config.write_text(yaml.safe_dump({**config, "tracking": offline}))
        finish(rundir)
    dead.write_state(status="running", pid=999_999_999, host=os.uname().nodename)
    finish(elsewhere).write_state(status="running", host="another-machine")
    finish(broken).config.write_text("{")
    results = {result.folder: result for result in sync.sync([outputs])}
    assert len(results) == 5
    assert (results[done.path].status, results[done.path].problem) == ("completed", "")
    assert (results[dead.path].status, dead.read_state().reason) == ("killed", DIED)
    assert "not started yet" in results[waiting.path].problem
    assert "config.yaml cannot be read" in results[broken.path].problem
    assert "another-machine" in results[elsewhere.path].problem
    assert elsewhere.read_state().status == "running", "who is not on that machine cannot know"
    assert assert_mirrored(done, "FINISHED").info.run_name == "named"
    ended = assert_mirrored(dead, "KILLED").info.end_time
    assert ended == int(dead.metrics.stat().st_mtime * 1000), "it ended with its last record, not when we looked"


def test_sync_says_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains no run"):
        sync.sync([tmp_path])
    with pytest.raises(ConfigError, match="did you mean 'http'"):
        sync.sync([tmp_path], "htp://host")


def test_credentials_are_used_and_never_written(tmp_path: Path, server: Server) -> None:
    rundir = finish(make_run(tmp_path))
    (result,) = sync.sync([rundir.path], server.running().uri.replace("://", "://me:hunter2hunter2@"))
    assert result.problem == ""
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2hunter2"
    assert str(result.url).startswith(server.uri)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
