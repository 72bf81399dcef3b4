"""Results of runs, from their folders and from MLflow."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fixtures.mirrored_runs import finish, make_run, outputs

from runner.report import mlflow_results, results
from runner.tracking import metrics_log
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.rundir import RunDir


def selected(outputs: Path) -> RunDir:
    """A run of four steps whose ``model`` has the weights of step 2, the best ones."""
    rundir = make_run(outputs)
    for step, loss in ((0, 5.0), (2, 1.0), (4, 3.0)):
        evaluation = {"eval/loss": loss, "eval/perplexity": math.exp(loss)}
        metrics_log.append(rundir, {"step": step, "time": 1.7e9 + step, **evaluation})
    finish(rundir, range(1, 5))
    rundir.write_state(step=4, total_steps=4, summary={"best step": 2, "best metric": "eval/loss", "eval/loss": 1.0})
    return rundir


def test_evaluations_are_those_of_the_weights_in_the_model_folder(outputs: Path):
    (result,) = results.of_folders([selected(outputs)], outputs)
    assert result.metrics["eval/loss"] == result.metrics["eval/best_loss"] == 1.0
    assert result.metrics["eval/perplexity"] == math.exp(1.0), "also those that the summary does not have"
    assert result.metrics["train/loss"] == 1 / 4, "training went on to the last step"


def test_mlflow_has_the_same_results_as_the_folder(outputs: Path):
    rundir = selected(outputs)
    MlflowRun.of(rundir).update()
    (folder,) = results.of_folders([rundir], outputs)
    (stored,) = mlflow_results.read(f"sqlite:///{outputs}/mlflow.db", [])
    assert stored.metrics == folder.metrics
    assert (stored.label, stored.status, stored.mlflow_id) == (folder.label, folder.status, folder.mlflow_id)


@pytest.mark.parametrize("file", ["config.yaml", "state.json"])
def test_a_damaged_folder_is_a_result_without_numbers(outputs: Path, file: str):
    rundir = selected(outputs)
    (rundir.path / file).write_text("{")
    (result,) = results.of_folders([rundir], outputs)
    assert (result.status, dict(result.metrics)) == ("damaged", {})
    assert file in result.reason
