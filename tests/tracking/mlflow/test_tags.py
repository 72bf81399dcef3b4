"""The tags of a run in MLflow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from runner.tracking import metrics_log
from runner.tracking.mlflow import tags
from runner.tracking.rundir import RunDir


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["python", "-m", "runner", "lora.r=8"], "python -m runner lora.r=8"),
        (["python", "-m", "runner", "model.path=/models/llama", "data.path=a/b.jsonl"],
         "python -m runner model.path=llama data.path=b.jsonl"),
        ("python -m runner data/format=alpaca", "python -m runner format=alpaca"),
        (["python", "-m", "runner", "a=[/x/y,/z]"], "python -m runner 'a=[y,z]'"),
    ],
)  # fmt: skip
def test_the_source_has_no_folders(command: str | list[str], name: str) -> None:
    assert tags.source_name(command) == name


def test_the_commit_is_that_of_the_users_repository_if_there_is_one(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    manifest = {"git": {"sha": "ours", "dirty": True}, "repositories": [{"sha": "theirs", "dirty": False}]}
    of_run = tags.of_run(rundir, manifest, rundir.read_state())
    assert (of_run["mlflow.source.git.commit"], of_run["runner.git_sha"]) == ("theirs", "ours")
    of_run = tags.of_run(rundir, {"git": {"sha": "ours"}}, rundir.read_state())
    assert of_run["mlflow.source.git.commit"] == "ours"


def test_the_metrics_of_the_model_are_those_of_its_step_if_it_is_not_the_last(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    for step, loss in ((2, 1.0), (4, 3.0)):
        evaluation = {"eval/loss": loss, "eval/f1": math.nan}
        metrics_log.append(rundir, {"step": step, "time": 0.0, "train/loss": 9.0, **evaluation})
    for best, expected in ((2, {"eval/loss": 1.0}), (4, None)):
        state = rundir.write_state(status="completed", step=4, summary={"best step": best})
        text = tags.of_run(rundir, {}, state)[tags.MODEL_METRICS]
        assert (json.loads(text) if text else None) == expected
