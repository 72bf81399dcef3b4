"""What tasks have in common: the loss of a step from its sums, metrics of tokens, and the losses of sources."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from runner.config import bind
from runner.tasks import task as tasks
from runner.tasks.sft import sft

SFT = sft(train_on="assistant")
OBJECTIVES = {OmegaConf.load(path).get("_target_") for path in (bind.config_dir() / "task").glob("*.yaml")} - {None}


@pytest.mark.parametrize("function", sorted(OBJECTIVES))
def test_an_objective_is_one_short_file(function: str) -> None:
    module = importlib.import_module(function.rpartition(".")[0])
    assert len(Path(str(module.__file__)).read_text().splitlines()) <= 150


def test_the_loss_of_a_step_is_the_sum_of_its_terms_over_their_divisors() -> None:
    task = replace(SFT, divisors={"pair_loss": "units", "sft_loss": "trained_first"})
    sums = {"pair_loss": 6.0, "sft_loss": 4.0, "pairs": 3.0}
    assert task.step_loss(sums, {"units": 3.0, "trained_first": 8.0}) == 2.5
    assert task.step_loss({**sums, "sft_loss": 0.0}, {"units": 3.0, "trained_first": 0.0}) == 2.0
    half = {name: value / 2 for name, value in sums.items()}
    assert 2 * task.step_loss(half, {"units": 3.0, "trained_first": 8.0}) == 2.5, "micro-batches add up"


def test_metrics_of_tokens_are_finite() -> None:
    assert tasks.token_metrics({"loss": 0.0, "count": 0.0, "correct": 0.0})["loss"] == 0.0
    metrics = tasks.token_metrics({"loss": 1e6, "count": 2.0, "correct": 1.0})
    assert (metrics["loss"], metrics["token_accuracy"]) == (5e5, 0.5)
    assert math.isfinite(metrics["perplexity"])


def test_the_loss_of_each_source_is_weighted_and_one_without_tokens_is_left_out() -> None:
    batch = {"sources": ["chat", "code", "law"], "source_at": torch.tensor([0, 2, 0])}
    sums = tasks.sums_of_sources(batch, torch.tensor([1.0, 5.0, 4.0]), torch.tensor([1.0, 2.0, 0.5]))
    losses = tasks.losses_of_sources({name: float(value) for name, value in sums.items()})
    assert losses == pytest.approx({"loss/chat": (1.0 + 4.0 * 0.5) / 1.5, "loss/law": 5.0})
    assert tasks.sums_of_sources({}, torch.ones(1), torch.ones(1)) == {}


@pytest.mark.parametrize("documents", [2, 1])
def test_the_loss_of_each_source_is_the_mean_of_its_pairs_or_documents(documents: int) -> None:
    owners = torch.tensor([0, 2, 0]).repeat_interleave(documents)
    batch = {"sources": ["chat", "code", "law"], "source_of": owners}
    losses, of_sft = torch.tensor([1.0, 5.0, 4.0]), (torch.tensor([2.0, 6.0, 8.0]), torch.tensor([1.0, 2.0, 4.0]))
    sums = {name: float(value) for name, value in tasks.unit_sums_of_sources(batch, losses).items()}
    assert tasks.losses_of_sources(sums) == {"loss/chat": 2.5, "loss/law": 5.0}
    sums = {name: float(value) for name, value in tasks.unit_sums_of_sources(batch, losses, of_sft).items()}
    assert tasks.losses_of_sources(sums) == {"loss/chat": 2.5 + 10 / 5, "loss/law": 5.0 + 3.0}
    empty = tasks.unit_sums_of_sources({**batch, "source_of": owners[:0]}, losses[:0])
    assert tasks.losses_of_sources({name: float(value) for name, value in empty.items()}) == {}
    assert tasks.unit_sums_of_sources({}, losses) == {}
