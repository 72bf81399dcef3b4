"""The best evaluation, early stopping, the time limit and the watchdog; against transformers' own callback."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, prepared
from fixtures import killed_runs
from safetensors.torch import load_file

from runner.errors import TrainingError
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import run_facts, selection, worker
from runner.train.checkpoint import Progress

BY_LOSS = selection.Selection("eval/loss", False, 2, 0.0, None, 3)
BEST = ("train.metric_for_best_model=eval/loss", "train.eval_steps=1")
NO_BETTER = (
    *TINY, "train.metric_for_best_model=eval/token_accuracy", "train.eval_steps=1", "optim.learning_rate=3",
    "train.save_total_limit=1",
)  # fmt: skip
"""Soon the model predicts the most frequent token everywhere, which is as right at the next steps."""


def noted(rule: selection.Selection, values: list[float]) -> Progress:
    """What is noted of these evaluations, up to the end of training."""
    progress = Progress()
    for step, value in enumerate(values):
        progress.step = step
        rule.evaluated(progress, {"eval/loss": value})
        if progress.ended:
            break
    return progress


@pytest.mark.parametrize("seed", range(20))
def test_training_ends_where_the_callback_of_transformers_ends_it(seed: int):
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    draw = random.Random(seed)
    larger, patience, threshold = draw.random() < 0.5, draw.randint(1, 3), draw.choice([0.0, 0.1])
    values = [draw.randint(0, 8) / 8 for _ in range(15)]
    callback, control = EarlyStoppingCallback(patience, threshold), TrainerControl()
    state = TrainerState(best_metric=None)
    arguments = TrainingArguments(output_dir="unused", metric_for_best_model="loss", greater_is_better=larger)
    for step, value in enumerate(values, 1):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": value})
        if state.best_metric is None or (value > state.best_metric if larger else value < state.best_metric):
            state.best_metric, state.best_global_step = value, step
        if control.should_training_stop:
            break
    ours = noted(replace(BY_LOSS, is_larger_better=larger, patience=patience, threshold=threshold), [0.0, *values])
    assert (ours.step, ours.best_value, ours.best_step) == (step, state.best_metric, state.best_global_step)
    assert bool(ours.ended) == control.should_training_stop


def test_the_start_and_nan_are_never_the_best():
    progress = noted(replace(BY_LOSS, patience=None), [0.1, math.nan, 0.5, 0.4, math.nan])
    assert (progress.best_step, progress.best_value, progress.without_gain) == (3, 0.4, 1)
    assert "eval/loss is nan" in noted(BY_LOSS, [0.1, math.nan, math.nan]).ended
    with pytest.raises(TrainingError, match="did you mean 'eval/loss'"):
        replace(BY_LOSS, metric="eval/los").evaluated(Progress(), {"eval/loss": 1.0})


def test_a_loss_that_stays_high_is_an_error():
    rule, progress = replace(BY_LOSS, highest_loss=2.0), Progress()
    for step, loss in enumerate([3.0, 3.0, 1.0, 3.0, 3.0], 1):
        rule.stepped(progress, step, loss)
    with pytest.raises(TrainingError, match=r"above 2 for 3 steps in a row, it is 2\.5 at step 6"):
        rule.stepped(progress, 6, 2.5)


def test_the_best_weights_are_the_result(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    rundir = prepared(tmp_path / "run", *NO_BETTER, "train.max_steps=8", "train.early_stopping_patience=2")
    assert worker.work(rundir) == 0
    records = {r["step"]: r for r in metrics_log.read(rundir) if "eval/loss" in r}
    best = max((record["eval/token_accuracy"], -step) for step, record in records.items() if step)[1] * -1
    state = rundir.read_state()
    assert (state.status, state.step, state.model_step) == ("completed", best + 2, best)
    assert state.step < state.total_steps == 8
    assert state.reason.startswith(f"stopped early at step {best + 2}: eval/token_accuracy is ")
    assert state.summary["eval/loss"] == records[best]["eval/loss"]
    assert f"of step {best}, the best by eval/token_accuracy" in capsys.readouterr().out
    saved = load_file(rundir.checkpoints / f"step-{best:06d}" / "trainable.safetensors")
    result = load_file(rundir.model / "adapter_model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, result[name.replace(".default", "")]), name
    assert sorted(path.name for path in rundir.checkpoints.iterdir()) == [f"step-{n:06d}" for n in (best, best + 2)]


def test_a_lost_best_checkpoint_is_forgotten_with_a_warning(tmp_path: Path, cache: Path):
    from test_loop import Recorded, parts_of

    from runner.train import loop

    _, parts = parts_of(tmp_path, *NO_BETTER, "train.max_steps=6")
    progress = loop.train(parts, Progress(), Recorded().hooks())
    weights = parts.checkpoints.folder / f"step-{progress.best_step:06d}" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert 0 < progress.best_step < 6
    with pytest.warns(UserWarning, match="best step.*is lost: checksum"):
        parts.checkpoints.restore_result(parts.model, progress)
    assert progress.best_step == 0
    rundir = RunDir(parts.checkpoints.folder.parent)
    assert {"best step", "best metric"}.isdisjoint(run_facts.numbers(rundir, parts, progress, 1.0))


def test_a_run_out_of_time_is_completed_with_what_it_has(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=50", "train.max_minutes=1e-9", "train.logging_steps=7")
    assert worker.work(rundir) == 0
    state, records = rundir.read_state(), metrics_log.read(rundir)
    assert (state.status, state.step, state.reason) == ("completed", 1, "stopped at step 1: train.max_minutes=1e-09")
    assert [r["step"] for r in records if "train/loss" in r] == [1]
    assert [r["step"] for r in records if "eval/loss" in r] == [0, 1]
    assert (rundir.model / "adapter_model.safetensors").exists()
    assert metrics_log.lost_of(state, records, {"train": {"logging_steps": 7, "eval_steps": None}}) == ""


@pytest.mark.slow
def test_kill_9_changes_nothing(tmp_path: Path, cache: Path):
    """Killed after each evaluation, and started again: the same records, the same best and the same end."""
    options = (*NO_BETTER, "train.max_steps=8", "train.early_stopping_patience=3", "train.save_steps=2")
    whole = prepared(tmp_path / "whole", *options)
    assert worker.work(whole) == 0
    killed = prepared(tmp_path / "killed", *options)
    killed_runs.kill_and_finish(killed, "eval/loss", range(1, whole.read_state().step + 1))
    killed_runs.assert_same_end(whole, killed)
