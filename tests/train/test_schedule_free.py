"""Schedule-free AdamW: the averages of the package are evaluated and saved, and training goes on without a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, prepared
from safetensors.torch import load_file
from test_loop import Recorded, parts_of

from runner.cli import main
from runner.errors import ConfigError
from runner.train import evaluation, loop, worker
from runner.train.checkpoint import Progress
from runner.train.ema import Average
from runner.train.parts import Parts

FREE = (*TINY, "optim=schedule_free", "schedule=constant", "optim.learning_rate=5e-2")
NAMED = "the averages of the weights are evaluated and saved (optim=schedule_free)"


def weights(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parts.model.named_parameters() if p.requires_grad}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("lora", ["lora=lora", "lora=none"])
def test_the_averages_are_evaluated_and_training_goes_on_with_the_weights(lora: str, tmp_path: Path, cache: Path):
    _, plain = parts_of(tmp_path / "plain", *FREE, "train.max_steps=4", lora)
    loop.train(plain, Progress(), Recorded().hooks())
    _, parts = parts_of(
        tmp_path / "often", *FREE, "train.max_steps=4", "train.eval_steps=1", "train.save_steps=1", lora
    )
    recorded = Recorded()
    loop.train(parts, Progress(), recorded.hooks())
    trained = weights(parts)
    assert differ(trained, weights(plain)) == [], "evaluations and checkpoints in between change no weight"
    alone = replace(parts, average=Average())
    of_weights = evaluation.evaluate(alone, 4, Recorded().hooks())["eval/loss"]
    optimizer: Any = parts.optimizer
    optimizer.eval()  # the package's own
    assert differ(trained, weights(parts))
    of_averages = evaluation.evaluate(alone, 4, Recorded().hooks())["eval/loss"]
    assert recorded.of("eval/loss")[-1] == of_averages != of_weights


@pytest.mark.parametrize("best", [(), ("train.metric_for_best_model=eval/loss",)])
def test_the_result_is_the_average(
    best: tuple[str, ...], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
):
    rundir = prepared(tmp_path / "run", *FREE, "train.max_steps=3", "train.eval_steps=1", *best)
    assert worker.work(rundir) == 0
    shown = capsys.readouterr()
    assert (shown.err.count(NAMED), shown.out.count(NAMED)) == (1, 1), "in the header and in the summary"
    saved = rundir.checkpoints / f"step-{rundir.read_state().model_step:06d}"
    averages, trained = (load_file(saved / name) for name in ("averages.safetensors", "trainable.safetensors"))
    assert differ(averages, trained)
    result = load_file(rundir.model / "adapter_model.safetensors")
    assert differ(averages, {name: result[name.replace(".default", "")] for name in averages}) == []


def test_the_plan_names_the_average(cache: Path, capsys: pytest.CaptureFixture[str]):
    assert main.run(["plan", *FREE]) == 0
    assert NAMED in capsys.readouterr().out


def test_a_second_schedule_or_average_is_refused():
    with pytest.raises(ConfigError) as refused:
        composed(*FREE, "schedule=cosine", "train.ema=0.9")
    assert str(refused.value) == (
        "schedule=cosine: optim=schedule_free replaces the schedule by an average of the weights\n"
        "    → use schedule=constant; its warm-up has an effect\n"
        "train.ema=0.9: optim=schedule_free averages the weights already\n    → set it to null"
    )
