"""Event files, read by TensorBoard itself."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from fixtures.mirrored_runs import assert_mirrored, finish, make_run, outputs

from runner.tracking import metrics_log
from runner.tracking.mirror import backlog, follow, spawn, sync
from runner.tracking.rundir import RunDir

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
ALSO = ["tensorboard"]


def shown(rundir: RunDir) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(rundir.tensorboard), {"scalars": 0, "tensors": 0})
    files.Reload()
    return files


def points(rundir: RunDir, name: str) -> list[tuple[int, float, float]]:
    return [(each.step, each.value, each.wall_time) for each in shown(rundir).Scalars(name)]


def expected(rundir: RunDir, name: str) -> list[tuple[int, float, float]]:
    records = (record for record in metrics_log.read(rundir) if name in record)
    return [(each["step"], pytest.approx(each[name]), pytest.approx(each["time"])) for each in records]


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


def test_a_process_that_follows_sees_the_file_cut_back(outputs: Path) -> None:
    from runner.tracking.also.sending import Sending
    from runner.tracking.mlflow.run import MlflowRun

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
