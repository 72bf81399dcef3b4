"""The auxiliary loss of routers: transformers' own, and the mean over the tokens of a step."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, composed
from fixtures.mixtures_of_experts import mixture
from fixtures.model_folders import source
from test_loop import Recorded, parts_of

from runner.errors import ConfigError
from runner.train import loop
from runner.train.checkpoint import Progress
from runner.train.router_balance import imbalance

theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe").load_balancing_loss_func


def test_it_is_transformers_own() -> None:
    logits = [torch.randn(50, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    torch.testing.assert_close(imbalance(logits, 2), theirs(tuple(logits), 4, 2))
    torch.testing.assert_close(imbalance([torch.zeros(8, 4)], 4), torch.tensor(4.0))


def words(folder: Path, *more: str) -> list[str]:
    return [*(word for word in TINY if word != "model=tiny"), "model=local", f"model.path={folder}",
            "train.max_steps=1", "lora=none", *more]  # fmt: skip


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_gradient_is_that_of_both_losses(packing: str, mixture: Path, tmp_path: Path, cache: Path) -> None:
    given = words(mixture, f"data.packing={packing}", "train.max_grad_norm=null", "optim=torch", "optim.name=SGD",
                  "optim.learning_rate=1.0")  # fmt: skip
    _, plain = parts_of(tmp_path / "plain", *given)
    _, both = parts_of(tmp_path / "both", *given, "train.router_aux_loss_coef=0.5")
    name = "model.layers.0.mlp.gate.weight"
    before = plain.model.get_parameter(name).detach().clone()
    recorded = [Recorded(), Recorded()]
    for parts, each in zip((plain, both), recorded, strict=True):
        loop.train(parts, Progress(), each.hooks())
    steps = [before - parts.model.get_parameter(name).detach() for parts in (plain, both)]

    made, fresh = parts_of(tmp_path / "fresh", *given)
    (batch,) = fresh.prefetcher.step(0)
    fresh.model.train()
    logits = list[torch.Tensor]()
    for layer in fresh.model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: logits.append(output[0]))
    fresh.task.loss(fresh.model, batch)
    assert len(logits) == 2
    is_token = batch["input_ids"].flatten() != made.tokenizer.pad_token_id
    assert int(is_token.sum()) == batch["tokens"]
    assert (batch["tokens"] < is_token.numel()) is (packing == "false"), "padding does not count"
    aux = theirs(tuple(each.reshape(-1, 4)[is_token] for each in logits), 4, 2)
    (0.5 * aux).backward()
    torch.testing.assert_close(steps[1] - steps[0], fresh.model.get_parameter(name).grad, atol=1e-5, rtol=1e-3)
    assert recorded[1].of("train/router_loss") == pytest.approx([aux.item()], rel=1e-5)
    assert recorded[0].of("train/loss") == pytest.approx(recorded[1].of("train/loss"), rel=1e-6)
    assert recorded[0].of("eval/loss")[0] == recorded[1].of("eval/loss")[0], "an evaluation has no auxiliary loss"


def test_micro_batches_count_as_much_as_they_have_tokens(mixture: Path, tmp_path: Path, cache: Path) -> None:
    given = words(
        mixture,
        "train.router_aux_loss_coef=0.5",
        "train.per_device_batch_size=1",
        "train.gradient_accumulation_steps=2",
    )
    _, parts = parts_of(tmp_path, *given)
    recorded = Recorded()
    batches = parts.prefetcher.step(0)
    losses = []
    with torch.enable_grad():
        for batch in batches:
            sums = parts.wrapped.forward(batch)
            losses.append(sums["router_loss"].item() / 0.5)
    expected = sum(losses) / sum(batch["tokens"] for batch in batches)
    _, parts = parts_of(tmp_path / "run", *given)
    loop.train(parts, Progress(), recorded.hooks())
    assert recorded.of("train/router_loss") == pytest.approx([expected], rel=1e-5)


def test_a_model_without_routers_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.router_aux_loss_coef=0\.1: LlamaForCausalLM has no routers"):
        parts_of(tmp_path, *TINY, "train.router_aux_loss_coef=0.1")


def test_it_is_not_in_the_graph_of_the_whole_model() -> None:
    with pytest.raises(ConfigError, match=r"compile: train\.router_aux_loss_coef reads the routers from outside"):
        composed(*TINY, "train.router_aux_loss_coef=0.1", "compile=default")
