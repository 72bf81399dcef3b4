"""The evaluation of a run: its batches, its metrics, and a stop in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_loop import Recorded, parts_of, trained

from runner.errors import Preempted
from runner.tasks.reward import reward
from runner.tasks.sft import sft
from runner.train import evaluation, loop
from runner.train.checkpoint import Progress


def test_a_stop_during_an_evaluation_is_taken_up_there(tmp_path: Path, cache: Path):
    options = (*TINY, "train.max_steps=4", "train.eval_steps=2", "train.save_steps=2")
    _, uninterrupted = trained(tmp_path / "whole", *options)
    _, parts = parts_of(tmp_path / "halves", *options)
    first = Recorded(stop_at=2)
    hooks = replace(first.hooks(), check_stop=lambda: None, evaluating=lambda *_: first._check())
    with pytest.raises(Preempted):
        loop.train(parts, Progress(), hooks)
    _, parts = parts_of(tmp_path / "halves", *options)
    progress = parts.checkpoints.restore(parts.model, parts.optimizer)
    assert loop.boundary(progress) == (2, False)
    second = Recorded()
    loop.train(parts, progress, second.hooks())
    assert first.of("eval/loss") + second.of("eval/loss") == uninterrupted.of("eval/loss")
    assert len(second.saves) == 2, "step 2 once more, now evaluated, and the last"


def test_an_evaluation_counts_its_batches_without_making_them(tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *TINY, "data.eval_rows=5", "data.packing=false", "train.per_device_batch_size=2")
    told: list[tuple[int, int]] = []
    evaluation.evaluate(
        parts, 0, replace(Recorded().hooks(), evaluating=lambda done, count: told.append((done, count)))
    )
    count = len(list(parts.evaluation.one_pass()))
    assert told == [(done, count) for done in range(count + 1)]


def test_the_metrics_of_a_set_with_a_name_contain_the_name() -> None:
    sums = {"": {"loss": 4.0, "count": 2.0, "correct": 1.0}, "law": {"loss": 3.0, "count": 1.0, "correct": 1.0}}
    metrics = evaluation.metrics_of(sft(train_on="assistant"), sums)
    assert (metrics["eval/loss"], metrics["eval/token_accuracy"]) == (2.0, 0.5)
    assert (metrics["eval/law/loss"], metrics["eval/law/token_accuracy"]) == (3.0, 1.0)


def test_sums_are_added_in_float64_and_of_maxima_the_largest_counts() -> None:
    task, totals = reward(center_rewards_coefficient=0.0), dict[str, torch.Tensor]()
    for loss, largest in ((2.0**24, 1.0), (1.0, 3.0), (1.0, -2.0)):
        evaluation.add(task, totals, {"loss": torch.tensor(loss), "largest": torch.tensor(largest)})
    assert {name: float(value) for name, value in totals.items()} == {"loss": 2.0**24 + 2, "largest": 3.0}
