"""MLflow's environment variables choose what the configuration leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import composed, node

from runner.errors import ConfigError
from runner.tracking import environment

SERVER = "http://127.0.0.1:9"


def settled(*overrides: str, **tracking: Any) -> tuple[dict[str, Any], list[str]]:
    cfg = {"tracking": node("tracking", "mlflow", **tracking)}
    faults = environment.settle(cfg, overrides)
    return cfg["tracking"], [fault.key for fault in faults]


def test_they_choose_store_and_experiment_and_are_frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    cfg = composed("model=tiny", "outputs_dir=o")
    assert (cfg["tracking"]["uri"], cfg["tracking"]["experiment"]) == (SERVER, "theirs"), "without the password"
    assert list(environment.sources(cfg["tracking"])) == ["MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"]
    cfg = composed("model=tiny", "tracking.experiment=mine", "tracking.uri=null")
    assert (cfg["tracking"]["uri"], cfg["tracking"]["experiment"]) == (None, "mine"), "what is typed comes first"
    assert "uri" not in composed("model=tiny", "tracking=offline")["tracking"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert composed("model=tiny")["tracking"]["uri"] == f"sqlite:///{tmp_path}/mlflow.db", "as MLflow reads it"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MLFLOW_TRACKING_URI", "mlruns", "is a folder"), ("MLFLOW_TRACKING_URI", "databricks", "is a folder"),
        ("MLFLOW_EXPERIMENT_NAME", "x" * 300, "1 to 250 characters"), ("MLFLOW_RUN_ID", "3f2a", "unset it"),
        ("MLFLOW_EXPERIMENT_ID", "7", "set MLFLOW_EXPERIMENT_NAME"),
    ],
)  # fmt: skip
def test_what_cannot_take_effect_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as refused:
        composed("model=tiny")
    assert [fault.key for fault in refused.value.faults] == [name]
    assert composed("model=tiny", "tracking=offline"), "without MLflow they are not needed"


def test_a_name_in_the_configuration_makes_the_id_of_an_experiment_superfluous(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    assert settled(experiment="mine")[1] == []
    assert settled("tracking.experiment=runner")[1] == []
    assert settled()[1] == ["MLFLOW_EXPERIMENT_ID"]


def test_variables_that_have_no_effect_are_mentioned(monkeypatch: pytest.MonkeyPatch):
    assert list(environment.notes({"also": []})) == []
    for name in ("MLFLOW_TAGS", "WANDB_PROJECT", "WANDB_NAME", "WANDB_API_KEY", "TRACKIO_PROJECT"):
        monkeypatch.setenv(name, "x")
    assert list(environment.notes({"also": ["trackio"]})) == [
        "MLFLOW_TAGS has no effect: set tracking.tags.NAME=VALUE",
        "WANDB_PROJECT and WANDB_NAME have no effect: tracking.also=[wandb] sends the records there, too",
    ]


def test_opening_a_store_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from runner.tracking.mlflow import store

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    store.connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert environment.store_uri() == ""
