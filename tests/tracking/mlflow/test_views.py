"""An experiment opens in MLflow's pages with the loss in sight."""

from __future__ import annotations

import json
from pathlib import Path

from runner.tracking.mlflow import store, views


def test_an_experiment_gets_the_view_and_keeps_the_kind_that_somebody_chose(tmp_path: Path):
    client = store.connect(f"sqlite:///{tmp_path}/mlflow.db")
    mine = client.create_experiment("mine", tags={views.KIND_TAG: "genai_development", views.TAG: "{}"})
    assert store.experiment_id(client, "mine", tmp_path) == mine, "made by somebody else"
    new = store.experiment_id(client, "new", tmp_path)
    found = {name: client.get_experiment(each).tags for name, each in (("mine", mine), ("new", new))}
    assert found["mine"][views.KIND_TAG] == "genai_development"
    assert found["new"][views.KIND_TAG] == views.TRAINING
    for tags in found.values():
        assert json.loads(tags[views.TAG]) == views.view()


def test_the_view_begins_with_the_loss_and_fits_into_a_tag():
    assert len(views.tags()[views.TAG]) < 5000, "MLflow's limit for a tag of an experiment"
    view = views.view()
    assert view["selectedColumns"][:3] == [
        "metrics.`best/eval/loss`", "metrics.`eval/loss`", "metrics.`train/tokens_per_second`"
    ]  # fmt: skip
    assert [section["name"] for section in view["compareRunSections"]] == ["eval", "train", "memory"]
    charts = [(chart["type"], chart["metricKey"], chart["metricSectionId"]) for chart in view["compareRunCharts"]]
    assert charts[:3] == [
        ("BAR", "best/eval/loss", "runner-eval"), ("LINE", "eval/loss", "runner-eval"),
        ("LINE", "train/loss", "runner-train"),
    ]  # fmt: skip
