"""A run folder in MLflow, with a real database and a real server."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from fixtures import versions
from fixtures.lost_answers import Cutting
from fixtures.mirrored_runs import REPORT, Server, assert_mirrored, finish, history, make_run, outputs, the_run

from runner.files import copy_of
from runner.tracking import metrics_log
from runner.tracking.mirror import follow, sync
from runner.tracking.mlflow import store
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.rundir import RunDir

# --- what MLflow is told, in this process -----------------------------------------------------------------------------


def test_a_whole_run(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    run, client = assert_mirrored(rundir, "FINISHED"), store.connect(f"sqlite:///{outputs}/mlflow.db")
    assert run.info.run_name == "run"
    assert run.info.start_time == 1_700_000_000_000
    assert run.info.end_time == int(rundir.read_state().updated * 1000)
    assert run.data.params["lora.r"] == "8"
    assert run.data.params["lora.target_modules"] == '["q", "v"]'
    assert run.data.params["tracking.uri"] == "null"
    expected = {
        "runner.signature": "0123456789abcdef", "runner.status": "completed", "runner.git_sha": "c0ffee",
        "runner.git_dirty": "true", "runner.attempt": "1", "runner.folder": str(rundir.path),
        "runner.id": rundir.read_manifest()["id"],
        "runner.kind": "run", "runner.command": "python -m runner lora.r=8",
        "mlflow.source.name": "python -m runner lora.r=8", "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c0ffee", "mlflow.runName": "run",
    }  # fmt: skip
    assert expected.items() <= run.data.tags.items()
    assert "runner.reason" not in run.data.tags
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == ("chitchat", "d" * 36, "local")
    assert json.loads(given.dataset.profile) == REPORT
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert kept == {
        "config.yaml", "manifest.json", "train.log", "samples.json", "environment.json", "dirty.diff", "model"
    }  # fmt: skip
    assert run.info.artifact_uri.startswith(f"file://{outputs}/mlartifacts/")
    assert rundir.read_manifest()["mlflow"]["url"] is None


def test_tags_and_notes_are_those_of_a_new_run_and_may_be_edited(outputs: Path) -> None:
    rundir = finish(make_run(outputs, tags={"team": "nlp", "try": 2}, notes="first\nsecond"), status="preempted")
    MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(f"sqlite:///{outputs}/mlflow.db")
    wanted = {"team": "nlp", "try": "2", "mlflow.note.content": "first\nsecond"}
    assert wanted.items() <= run.data.tags.items()
    client.set_tag(run.info.run_id, "mlflow.note.content", "edited")
    client.delete_tag(run.info.run_id, "team")
    rundir.write_state(status="completed")
    MlflowRun.of(rundir).update()
    tags = assert_mirrored(rundir, "FINISHED").data.tags
    assert (tags["mlflow.note.content"], tags["try"], "team" in tags) == ("edited", "2", False)


def test_again_and_again_changes_nothing(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    first = the_run(rundir)
    same = MlflowRun.of(rundir)
    for _ in range(3):
        same.update()
    assert assert_mirrored(rundir, "FINISHED").to_dictionary() == first.to_dictionary()


def test_a_crash_before_the_id_was_noted_makes_no_second_run(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    first = rundir.read_manifest()["mlflow"]["run_id"]
    for noted in (None, {"run_id": "0" * 32}):
        rundir.update_manifest(mlflow=noted)
        MlflowRun.of(rundir).update()
        assert rundir.read_manifest()["mlflow"]["run_id"] == first
    assert_mirrored(rundir, "FINISHED")


def test_a_copied_folder_is_a_run_of_its_own(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    twin = RunDir(outputs / "runs" / "twin")
    shutil.copytree(rundir.path, twin.path)
    twin.update_manifest(id="another")
    MlflowRun.of(twin).update()
    assert rundir.read_manifest()["mlflow"]["run_id"] != twin.read_manifest()["mlflow"]["run_id"]
    assert_mirrored(twin, "FINISHED")


def test_a_resume_goes_on_with_the_same_run(outputs: Path) -> None:
    """The worker died at step 5, its checkpoint is of step 3: 4 and 5 come again and are in MLflow once."""
    rundir = finish(make_run(outputs), range(1, 6), "preempted")
    live = MlflowRun.of(rundir)
    live.update()
    assert assert_mirrored(rundir, "KILLED").data.tags["runner.status"] == "preempted"
    metrics_log.rewind(rundir, 3)
    rundir.write_state(status="running", reason="")
    live.update()
    assert the_run(rundir).info.status == "RUNNING"
    config = yaml.safe_load(rundir.config.read_text())
    rundir.config.write_text(yaml.safe_dump({**config, "seed": 1, "added": "x"}))
    finish(rundir, range(4, 9))
    MlflowRun.of(rundir).update()
    run = assert_mirrored(rundir, "FINISHED")
    assert run.data.params["seed"] == "0", "params never change in MLflow"
    assert json.loads(run.data.tags["runner.changed_params"]) == {"seed": "1"}
    assert run.data.params["added"] == "x"
    assert live.sent == 3
    live.update()
    assert live.sent == 8, "a mirror that was there all the time sees the file cut back and grown anew"
    assert_mirrored(rundir, "FINISHED")


def test_deleted_runs_and_experiments_are_reported_and_not_created_again(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    noted, client = rundir.read_manifest()["mlflow"], store.connect(f"sqlite:///{outputs}/mlflow.db")
    client.delete_run(noted["run_id"])
    assert "was deleted" in MlflowRun.of(rundir).try_update()
    client.restore_run(noted["run_id"])
    assert MlflowRun.of(rundir).try_update() == ""
    client.delete_experiment(noted["experiment_id"])
    assert "tracking.experiment=tests: was deleted in MLflow" in MlflowRun.of(rundir).try_update()


@pytest.mark.parametrize(
    ("log_model", "adapter", "kept"), [("adapter", True, 1), ("adapter", False, 0), (True, False, 1), (False, True, 0)]
)
@versions.mlflow_3
def test_the_model_is_kept_when_it_is_asked_for(outputs: Path, log_model: Any, adapter: bool, kept: int) -> None:
    rundir = finish(make_run(outputs, log_model=log_model))
    if not adapter:
        (rundir.model / "adapter_config.json").rename(rundir.model / "config.json")
    MlflowRun.of(rundir).update()
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    assert len(client.list_artifacts(the_run(rundir).info.run_id, "model")) == kept
    rundir.write_state(status="running")
    rundir.write_state(status="completed")
    MlflowRun.of(rundir).update()
    assert len(the_run(rundir).outputs.model_outputs) == kept, "the column Models names it, once"


def test_artifacts_that_cannot_be_stored_leave_no_run_running(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    live = MlflowRun.of(rundir)
    rundir.write_state(status="running")
    live.update()
    (place,) = (outputs / "mlartifacts").iterdir()
    shutil.rmtree(place / "artifacts")
    (place / "artifacts").write_text("in the way")
    rundir.write_state(status="completed")
    assert live.try_update() != ""
    assert the_run(rundir).info.status == "FINISHED"
    (place / "artifacts").unlink()
    assert live.try_update() == ""
    assert "runner.mirrored" in the_run(rundir).data.tags


@versions.mlflow_3
def test_a_server_takes_what_a_database_takes(tmp_path: Path, server: Server) -> None:
    rundir = make_run(tmp_path, uri=server.running().uri)
    config = yaml.safe_load(rundir.config.read_text())
    rundir.config.write_text(yaml.safe_dump({**config, "empty": "", "long": "x" * 7000}))
    metrics_log.append(rundir, {"step": 0, "time": 1.7e9, "odd": math.nan, "high": math.inf})
    finish(rundir)
    for _ in range(2):
        MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(server.uri)
    assert math.isnan(history(client, run.info.run_id, "odd")[0][1])
    assert history(client, run.info.run_id, "high") == [(0, sys.float_info.max)]
    assert sorted(history(client, run.info.run_id, "train/loss")) == [(step, 1 / step) for step in range(1, 6)]
    assert (run.data.params["empty"], len(run.data.params["long"])) == ('""', 6000)
    assert len(run.inputs.dataset_inputs) == 1
    mlflow.set_tracking_uri(server.uri)  # for artifacts of models; tests before set others
    assert {item.path for item in client.list_artifacts(run.info.run_id, "model")} == {"model/adapter_config.json"}
    assert rundir.read_manifest()["mlflow"]["url"] == (
        f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    )
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("times", [1, 2, 3])
@versions.mlflow_3
def test_a_lost_answer_doubles_neither_runs_nor_models(tmp_path: Path, server: Server, times: int) -> None:
    """The server does what it is asked, but its answer is lost; MLflow's client asks a second time by itself."""
    proxy = Cutting(server.running(), "/runs/create", "/mlflow/logged-models", times=times)
    rundir = finish(make_run(tmp_path, uri=proxy.uri))
    problems = [MlflowRun.of(rundir).try_update() for _ in range(4)]
    assert problems[-1] == ""
    assert proxy.cut >= times
    run, client = assert_mirrored(rundir, "FINISHED"), store.connect(server.uri)
    query = f"tags.`runner.id` = '{rundir.read_manifest()['id']}'"
    assert len(client.search_runs([run.info.experiment_id], query)) == 1
    models = client.search_logged_models([run.info.experiment_id], f"tags.`runner.run_id` = '{run.info.run_id}'")
    assert [(model.model_id, str(model.status)) for model in models] == [(run.data.tags["runner.model_id"], "READY")]


@versions.mlflow_3
def test_sync_closes_a_double_that_appears_later(tmp_path: Path, server: Server) -> None:
    """As when a slow server handles a request after its client has given up."""
    rundir = finish(make_run(tmp_path, uri=server.running().uri))
    assert sync.sync([rundir.path])[0].problem == ""
    run, client = the_run(rundir), store.connect(server.uri)
    double = client.create_run(run.info.experiment_id, run.info.start_time, {"runner.id": run.data.tags["runner.id"]})
    with_metrics = client.create_run(run.info.experiment_id, None, {"runner.id": run.data.tags["runner.id"]})
    client.log_metric(with_metrics.info.run_id, "kept", 1.0)
    assert sync.sync([rundir.path])[0].problem == ""
    closed, kept = (client.get_run(each.info.run_id) for each in (double, with_metrics))
    assert (closed.info.status, closed.info.lifecycle_stage) == ("KILLED", "deleted")
    assert (kept.info.status, kept.info.lifecycle_stage) == ("KILLED", "active"), "what has numbers is not deleted"
    assert kept.data.tags["runner.double_of"] == run.info.run_id
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_run_that_waits_for_another_attempt_is_scheduled(outputs: Path) -> None:
    """A failed job that was submitted again, and whose job has not started."""
    rundir = finish(make_run(outputs), status="failed")
    MlflowRun.of(rundir).update()
    assert the_run(rundir).info.status == "FAILED"
    rundir.write_state(status="pending", reason="")
    (result,) = sync.sync([rundir.path])
    assert (result.status, result.problem) == ("pending", "")
    run = the_run(rundir)
    assert (run.info.status, run.data.tags["runner.status"]) == ("SCHEDULED", "pending")
    never_started = make_run(outputs, "other")
    never_started.write_state(status="pending", attempt=0)
    assert sync.sync([never_started.path])[0].problem == sync.UNBEGUN


def test_a_damaged_folder_does_not_stop_the_sync_of_the_others(outputs: Path) -> None:
    state, manifest, sound = (finish(make_run(outputs, name)) for name in ("a", "b", "c"))
    state.state.write_text('{"status": "comp')
    for file in (manifest.manifest, copy_of(manifest.manifest)):
        file.write_text("")
    results = {result.folder: result for result in sync.sync([outputs])}
    assert "state.json is damaged" in results[state.path].problem
    assert "manifest.json is damaged" in results[manifest.path].problem
    assert (results[sound.path].status, results[sound.path].problem) == ("completed", "")


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_run_that_lost_its_manifest_stays_one_run(outputs: Path, damage: str) -> None:
    rundir = finish(make_run(outputs))
    sync.sync([outputs])
    before, run = rundir.read_manifest(), the_run(rundir).info.run_id
    rundir.manifest.write_text("{") if damage == "cut" else rundir.manifest.unlink()
    (result,) = sync.sync([outputs])
    assert (result.status, result.problem) == ("completed", "")
    assert json.loads(rundir.manifest.read_text()) == before
    assert the_run(rundir).info.run_id == run
    copy_of(rundir.manifest).unlink()
    rundir.manifest.unlink()
    rundir.metrics.touch()
    (result,) = sync.sync([outputs])
    assert "manifest.json is lost" in result.problem, "without its id, a second MLflow run would be created"


def test_a_run_whose_folder_is_removed_does_not_stay_running(outputs: Path) -> None:
    rundir = make_run(outputs)
    with rundir.held():
        rundir.write_state(status="running", started=time.time(), host=os.uname().nodename)
        metrics_log.append(rundir, {"step": 1, "time": time.time(), "train/loss": 1.0})
        follower = follow.Follower(MlflowRun.of(rundir), updates_parent=False)
        assert not follower.step()
        run = the_run(rundir)
        assert run.info.status == "RUNNING"
        shutil.rmtree(rundir.path)
        assert follower.step()
    run = store.connect(f"sqlite:///{outputs}/mlflow.db").get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["runner.status"]) == ("KILLED", "killed")
    assert "was removed" in run.data.tags["runner.reason"]
