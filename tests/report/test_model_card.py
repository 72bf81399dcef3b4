"""Model cards."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, prepared

from runner.report import columns, leaderboard, model_card, results
from runner.report.columns import Goal
from runner.tracking.mlflow import run as mlflow_run
from runner.tracking.rundir import RunDir
from runner.train import worker

METRICS = ["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"]


@pytest.fixture(scope="module")
def preference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> RunDir:
    """A trained run of task=dpo."""
    words = (*TINY, "task=dpo", "data=chitchat_pairs", "train.max_steps=8")
    rundir = prepared(tmp_path_factory.mktemp("dpo") / "run", *words)
    assert worker.work(rundir) == 0
    return rundir


def test_a_card_shows_the_metrics_of_the_task(preference: RunDir):
    card = model_card.text(preference, ("adapter",), "", {}, is_chat=True)
    rows = [line for line in card.splitlines() if line.startswith("| eval/")]
    assert [row.split("|")[1].strip() for row in rows] == METRICS
    last, first = (preference.read_state().summary[f"{METRICS[2]}{moment}"] for moment in ("", " before"))
    assert rows[2] == f"| {METRICS[2]} | {first:.4f} | {last:.4f} |"


def test_a_comparison_shows_the_metrics_of_the_task(preference: RunDir):
    (result,) = results.of_folders([preference], preference.path.parent)
    assert leaderboard.of([result]).metrics[:4] == [METRICS[0], "eval/best_loss", *METRICS[1:]]
    tags = mlflow_run.tags(preference, preference.read_manifest(), preference.read_state())
    assert tags["runner.task_metrics"].split() == METRICS
    larger, smaller = ("rewards/accuracies", "rewards/margins", "rewards/chosen"), ("rewards/rejected", "nll")
    for name, is_larger_better in {**dict.fromkeys(larger, True), **dict.fromkeys(smaller, False)}.items():
        goal = columns.goal(f"eval/{name}", [result], "--sort")
        assert goal == Goal(f"eval/{name}", is_larger_better)
        assert columns.rated(Goal(goal.key, not is_larger_better)) == goal
