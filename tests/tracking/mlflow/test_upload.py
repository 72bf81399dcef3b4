"""Params, metrics and tables within the limits of MLflow."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures.mirrored_runs import finish, history, make_run, outputs, the_run
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from runner.config import bind
from runner.tracking import metrics_log
from runner.tracking.mlflow import store, upload
from runner.tracking.mlflow.run import MlflowRun


def test_samples_are_a_table(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(f"sqlite:///{outputs}/mlflow.db")
    table = client.load_table(run.info.experiment_id, "samples.json", [run.info.run_id])
    assert list(table["prompt"]) == ["Hi", "Ho"]
    assert list(table["after"])[1] == "z"


def test_data_that_another_run_enters_at_the_same_moment(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")]
    enter = MlflowClient.log_inputs

    def log_inputs(*arguments: Any) -> None:
        if errors:
            raise errors.pop()
        enter(*arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", log_inputs)
    rundir = finish(make_run(outputs))
    assert MlflowRun.of(rundir).try_update() == ""
    assert [each.dataset.name for each in the_run(rundir).inputs.dataset_inputs] == ["chitchat"]


def test_limits_of_mlflow(outputs: Path) -> None:
    rundir = make_run(outputs)
    config = yaml.safe_load(rundir.config.read_text())
    many = {f"key{i}": i for i in range(250)}
    strange = {"*.weight": 1, "a//b": 2, "../up": 3, "käse": 4, "empty": "", "nothing": {}, "hf_token": "geheim"}
    config["extra"] = {**many, **strange, "long": "x" * 9000}
    rundir.config.write_text(yaml.safe_dump(config))
    rundir.update_manifest(command=["word"] * 4000, name="n" * 120)
    wide = {f"wide/{i}": float(i) for i in range(700)}
    for step in range(4):
        metrics_log.append(rundir, {"step": step, "time": 1.7e9, **wide})
    metrics_log.append(rundir, {"step": 4, "time": 1.7e9, **{f"wider/{i}": 1.0 for i in range(2300)}})
    rundir.write_state(status="completed", started=1.7e9)
    MlflowRun.of(rundir).update()
    run = the_run(rundir)
    assert len(run.data.params) == len(list(bind.flatten(config))), "no param is dropped"
    assert run.data.params["extra.key249"] == "249"
    assert run.data.params["extra._.weight"] == "1"
    assert run.data.params["extra.empty"] == '""'
    assert run.data.params["extra.hf_token"] == "***"
    assert run.data.params["extra.long"].endswith("[cut: 9000 characters; whole in config.yaml]")
    assert len(run.data.params["extra.long"]) == 6000
    assert run.data.tags["runner.cut_params"] == "extra.long"
    assert len(run.data.tags["mlflow.source.name"]) == 8000
    assert len(run.data.metrics) == 3000
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    assert history(client, run.info.run_id, "wide/699") == [(step, 699.0) for step in range(4)]


def test_a_record_is_not_split_between_batches() -> None:
    groups = [[1] * 600, [2] * 600, [3] * 300, [4] * 2500, [5]]
    batches = list(upload.batches(groups, 1000))
    assert [len(batch) for batch in batches] == [600, 900, 1000, 1000, 501]
    assert [item for batch in batches for item in batch] == [item for group in groups for item in group]
    assert set(batches[1]) == {2, 3}


def test_numbers_that_are_none(outputs: Path) -> None:
    rundir = make_run(outputs)
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
        metrics_log.append(rundir, {"step": step, "time": 1.7e9, "a": value})
    rundir.write_state(status="failed", reason="the loss is nan", started=1.7e9)
    for _ in range(2):
        MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(f"sqlite:///{outputs}/mlflow.db")
    (_, nan), (_, inf), (_, minus), (_, one) = sorted(history(client, run.info.run_id, "a"), key=lambda point: point[0])
    assert math.isnan(nan)
    assert (inf, minus, one) == (sys.float_info.max, -sys.float_info.max, 1.0)
    assert (run.info.status, run.data.tags["runner.reason"]) == ("FAILED", "the loss is nan")
