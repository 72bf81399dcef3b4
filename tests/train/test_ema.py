"""The average of the weights: against torch's AveragedModel; it is what is evaluated and what is saved."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, composed, prepared
from safetensors.torch import load_file
from test_loop import Recorded, parts_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.cli import main
from runner.errors import ConfigError, Preempted
from runner.train import ema, evaluation, loop, worker
from runner.train.checkpoint import Progress
from runner.train.ema import Average
from runner.train.parts import Parts

FAST = (*TINY, "train.max_steps=6", "optim.learning_rate=5e-2")


def trained_weights(parts: Parts) -> nn.ParameterList:
    return nn.ParameterList([p for p in parts.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("lora", ["lora=lora", "lora=none"])
def test_the_averages_are_those_of_torch(lora: str, tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *FAST, lora, "train.ema=0.3")
    ours, progress = list(parts.average.weights.values()), Progress()
    slow = AveragedModel(
        trained_weights(parts),
        avg_fn=lambda average, now, n: average + (now - average) * (1 - min(0.3, (1 + float(n)) / (10 + float(n)))),
    )
    slow.update_parameters(trained_weights(parts))  # the first call copies
    for step in range(1, 7):
        before = [each.clone() for each in ours]
        loop.optimizer_step(parts, progress, Recorded().hooks())
        slow.update_parameters(trained_weights(parts))
        torch.testing.assert_close(ours, list(slow.module.parameters()), rtol=1e-5, atol=1e-7, check_stride=False)
        if step >= 3:  # 4 / 13 > 0.3: the decay that was asked for
            get_ema_multi_avg_fn(0.3)(before, list(trained_weights(parts)), step)
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_the_averages_are_evaluated_and_training_goes_on_with_the_weights(tmp_path: Path, cache: Path):
    _, plain = parts_of(tmp_path / "plain", *FAST)
    loop.train(plain, Progress(), Recorded().hooks())
    _, parts = parts_of(tmp_path / "averaged", *FAST, "train.ema=0.9", "train.eval_steps=2")
    recorded = Recorded()
    loop.train(parts, Progress(), recorded.hooks())
    for ours, theirs in zip(trained_weights(parts), trained_weights(plain), strict=True):
        assert torch.equal(ours, theirs), "an evaluation in between changes no weight"
    assert all(average.dtype == torch.float32 for average in parts.average.weights.values())

    alone = replace(parts, average=Average())
    of_weights = evaluation.evaluate(alone, 6, Recorded().hooks())["eval/loss"]
    parts.average.give()
    of_averages = evaluation.evaluate(alone, 6, Recorded().hooks())["eval/loss"]
    assert recorded.of("eval/loss")[-1] == of_averages != of_weights


def test_a_stop_in_the_middle_of_an_evaluation_leaves_the_weights(tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *FAST, "train.ema=0.9")
    loop.optimizer_step(parts, Progress(), Recorded().hooks())
    before = [p.detach().clone() for p in trained_weights(parts)]
    with contextlib.suppress(Preempted), parts.average.in_model():
        assert not all(torch.equal(a, b) for a, b in zip(before, trained_weights(parts), strict=True))
        raise Preempted
    assert all(torch.equal(a, b) for a, b in zip(before, trained_weights(parts), strict=True))


@pytest.mark.parametrize("best", [(), ("train.metric_for_best_model=eval/loss",)])
def test_the_result_is_the_average_and_the_run_says_so(
    best: tuple[str, ...], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=3", "train.ema=0.5", "train.eval_steps=1", *best)
    assert worker.work(rundir) == 0
    said = "the averages of the weights are evaluated and saved (train.ema=0.5)"
    shown = capsys.readouterr()
    assert (shown.err.count(said), shown.out.count(said)) == (1, 1), "in the header and in the summary"
    saved = rundir.checkpoints / f"step-{rundir.read_state().model_step:06d}"
    averages, weights = (load_file(saved / name) for name in ("averages.safetensors", "trainable.safetensors"))
    result = load_file(rundir.model / "adapter_model.safetensors")
    for name, tensor in averages.items():
        assert torch.equal(tensor, result[name.replace(".default", "")]), name
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in averages.items())
    assert main.run(["export", str(rundir.path), str(tmp_path / "export")]) == 0
    assert "averaged weights: train.ema=0.5" in (tmp_path / "export" / "README.md").read_text()


def test_the_plan_counts_the_averages(cache: Path, capsys: pytest.CaptureFixture[str]):
    from runner.train import estimate, inputs
    from runner.train.options import Options

    plain, averaged = (
        estimate.expect(inputs.inputs(Options(composed(*TINY, *more)))) for more in ((), ("train.ema=0.9",))
    )
    assert averaged.memory.weights - plain.memory.weights == 4 * plain.counts["trainable"]
    assert main.run(["plan", *TINY, "train.ema=0.9"]) == 0
    assert "evaluated and saved (train.ema=0.9)" in capsys.readouterr().out


def test_the_mean_of_the_last_steps_is_that_of_torch():
    model = nn.Linear(3, 2)
    decay, optimizer = ema.decay_of(None, 0.5, 6), torch.optim.SGD(model.parameters(), lr=0.1)
    ours, theirs = Average.of(model, "", decay, optimizer), AveragedModel(model)
    for step in range(1, 7):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        ours.update(step)
        if step <= 3:
            assert all(torch.equal(ours.weights[name], p) for name, p in model.named_parameters()), "not begun"
        else:
            theirs.update_parameters(model)
    torch.testing.assert_close(ours.weights, {n: p.detach() for n, p in theirs.module.named_parameters()})


def test_only_one_average_is_kept():
    assert composed(*TINY, "train.swa_start=0")
    with pytest.raises(ConfigError, match=r"train\.swa_start=0\.5: cannot be combined with train\.ema"):
        composed(*TINY, "train.swa_start=0.5", "train.ema=0.9")
    with pytest.raises(ConfigError, match=r"train\.swa_start=0\.5: "):
        composed(*TINY, "train.swa_start=0.5", "optim=schedule_free", "schedule=constant")


@pytest.mark.parametrize("value", ["0", "1", "true", "-0.5"])
def test_a_decay_is_a_fraction(value: str):
    with pytest.raises(ConfigError, match=r"train\.ema"):
        composed(*TINY, f"train.ema={value}")
