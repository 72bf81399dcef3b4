"""Where a run is in MLflow, as its manifest has it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.tracking.mlflow import place

RUN: Any = SimpleNamespace(info=SimpleNamespace(run_id="r", experiment_id="e"))


@pytest.mark.parametrize(
    ("uri", "parent"), [("http://me:secret@host:5000/", {"parent_run_id": "p"}), ("http://other:5000", {})]
)
def test_the_ids_replace_those_of_another_store(uri: str, parent: dict[str, str]) -> None:
    recorded = {"run_id": "old", "parent_run_id": "p", "uri": "http://host:5000/"}
    address = uri.replace("me:secret@", "")
    ids = {"run_id": "r", "experiment_id": "e", "uri": address}
    url = f"{address.rstrip('/')}/#/experiments/e/runs/r"
    assert place.noted(recorded, uri, RUN) == {**ids, "url": url, **parent}


def test_a_server_decides_where_its_artifacts_are() -> None:
    assert place.artifacts_dir("http://host:5000", "/outputs") is None
    assert place.artifacts_dir("sqlite:////outputs/mlflow.db", "/outputs") == Path("/outputs/mlartifacts")
