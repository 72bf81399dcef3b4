"""Options that have a state, or random numbers: a run that is stopped and resumed ends as one that never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import prepared
from fixtures.stopped_runs import SHORT, preempted_run
from test_resumed_runs import TIMES

from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import worker

OPTIONS = [
    "train.neftune_noise_alpha=20 train.gradient_accumulation_steps=2",
    "optim.loraplus_lr_ratio=16",
    "optim=muon optim.loraplus_lr_ratio=4",
    "model.new_tokens=[a_call] model.rope_scaling.rope_type=linear model.rope_scaling.factor=2",
    "optim=schedule_free schedule=constant train.metric_for_best_model=eval/loss train.save_total_limit=1",
    "lora=none optim=galore optim.rank=8 optim.update_proj_gap=2",
    "lora=none optim=apollo optim.rank=8 optim.update_proj_gap=3",
    "lora=none lora.trainable_layers=-1",
    "lora=lora_fa lora.init_lora_weights=eva",
    "quant=4bit lora.init_lora_weights=loftq lora.loftq_iter=2",
    "train.layer_norms=true train.profile=2 train.profile_start=3",
    "train.swa_start=0.3",
    "train.ema=0.9 train.metric_for_best_model=eval/loss train.save_total_limit=1",
]


def outcome(rundir: RunDir) -> dict[str, Any]:
    """The records without times and memory, and the weights."""
    records = [
        {k: v for k, v in record.items() if k not in TIMES and not k.startswith("memory/")}
        for record in metrics_log.read(rundir)
    ]
    return {"records": records, **{path.name: path.read_bytes() for path in rundir.model.glob("*.safetensors")}}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_stopped_run_ends_as_one_that_was_never_stopped(options: str, tmp_path: Path, cache: Path):
    options_ = (*SHORT, "optim.learning_rate=1e-2", "train.eval_steps=2", *options.split())
    whole = prepared(tmp_path / "whole", *options_)
    assert worker.work(whole) == 0
    halves = preempted_run(tmp_path / "halves", *options_)
    assert worker.work(halves) == 0
    assert halves.read_state().attempt == 2
    assert outcome(halves) == outcome(whole)
