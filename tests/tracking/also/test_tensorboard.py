"""Event files, read by TensorBoard itself."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from fixtures.event_files import expected, points, shown
from fixtures.mirrored_runs import assert_mirrored, finish, make_run, outputs

from runner.tracking import metrics_log
from runner.tracking.mirror import backlog, follow, spawn
from runner.tracking.rundir import RunDir

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
ALSO = ["tensorboard"]


def text(rundir: RunDir, tag: str) -> str:
    return str(shown(rundir).Tensors(tag)[-1].tensor_proto.string_val[0].decode())


def trial(rundir: RunDir) -> dict[str, Any]:
    """The run in the page of hyperparameters: {parameters, status}."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    contents = shown(rundir).summary_metadata
    start, end = HParamsPluginData(), HParamsPluginData()
    start.ParseFromString(contents["_hparams_/session_start_info"].plugin_data.content)
    end.ParseFromString(contents["_hparams_/session_end_info"].plugin_data.content)
    values = {name: value.string_value for name, value in start.session_start_info.hparams.items()}
    return {"parameters": values, "status": end.session_end_info.status}


def test_a_run_is_in_tensorboard_as_in_its_folder(outputs: Path) -> None:
    rundir = make_run(outputs, also=ALSO, notes="why")
    rundir.update_manifest(overrides=["lora.r=8", "+data.format.ignore=[x]"])
    finish(rundir)
    assert follow.follow(rundir) == 0
    assert_mirrored(rundir, "FINISHED")
    for name in ("train/loss", "train/tokens"):
        assert points(rundir, name) == expected(rundir, name)
    assert (text(rundir, "run/notes"), text(rundir, "run/end")) == ("why", "completed")
    assert "target_modules" in text(rundir, "run/config")
    assert trial(rundir) == {"parameters": {"lora.r": "8", "data.format.ignore": "[x]"}, "status": 1}
    assert spawn.read_report(rundir)["also"] == {"tensorboard": ""}
    assert not backlog.is_behind(rundir)


def test_a_resumed_run_has_no_point_twice(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=ALSO), range(1, 6), "preempted")
    (rundir.tensorboard).mkdir()
    (rundir.tensorboard / "events.out.tfevents.of.mine").write_bytes(b"")
    assert follow.follow(rundir) == 0
    assert text(rundir, "run/end") == "preempted"
    metrics_log.rewind(rundir, 3)
    finish(rundir, range(4, 9))
    assert follow.follow(rundir) == 0
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    assert text(rundir, "run/end") == "completed"
    assert len(list(rundir.tensorboard.iterdir())) == 2, "the file of another program stays"
