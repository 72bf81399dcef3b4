"""A finished run is a model of MLflow: loaded by plain MLflow from the store, it answers as plain PEFT does."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from conftest import prepared
from fixtures.trained_runs import TRAINED, _there, asked_plainly, run_id, trained
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from runner.cli import export
from runner.tracking import manifest
from runner.tracking.mlflow import pyfunc_model
from runner.train import inputs, mlmodel
from runner.train.options import Options


def test_a_run_is_loaded_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("first")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.read_manifest()["mlflow"]["uri"])
    mlflow.set_tracking_uri(run.read_manifest()["mlflow"]["uri"])
    model = mlflow.pyfunc.load_model(f"runs:/{run_id(run)}/model")
    plain = AutoPeftModelForCausalLM.from_pretrained(run.model)
    expected = asked_plainly(plain, AutoTokenizer.from_pretrained(run.model), "Hello!", 8)
    assert model.predict(["Hello!"], params={"max_new_tokens": 8}) == [expected]

    assert export.main([str(run.path), str(tmp_path / "exported")]) == 0
    assert not {path.name for path in (tmp_path / "exported").iterdir()} & set(pyfunc_model.FILES)
    moved = shutil.copytree(run.model, tmp_path / "moved")
    about = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(FileNotFoundError, match=r"not here: /gone/base.*register the run"):
        mlflow.pyfunc.load_model(str(moved))


def test_a_model_with_code_of_its_own_is_left_out(tmp_path: Path) -> None:
    rundir = prepared(tmp_path / "run", *TRAINED)
    given = inputs.inputs(Options(manifest.read_config(rundir)))
    rundir.model.mkdir()
    mlmodel.write(rundir, replace(given, source=replace(given.source, trust_remote_code=True)))
    assert not list(rundir.model.iterdir())
    mlmodel.write(rundir, given)
    assert {path.name for path in rundir.model.iterdir()} == set(pyfunc_model.FILES)
