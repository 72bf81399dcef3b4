"""Reward models: a number for each answer, larger for the chosen answer of a pair than for the rejected one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from runner.config.schema import NotNegative, Ratio
from runner.data.examples import Example, Features, misfit, options
from runner.errors import DataError, Fault
from runner.models.kernels.score_head import ScoreHead
from runner.tasks import scores
from runner.tasks.task import Task, unit_sums_of_sources


def reward(*, center_rewards_coefficient: NotNegative, head_lr_ratio: Ratio = 1.0) -> Task:
    """Bradley-Terry model of preferences: the reward r is the output of the head at the last token of an answer.

    ``center_rewards_coefficient``: weight of the squared sum of the two rewards of a pair, which keeps them around 0
    (https://arxiv.org/abs/2312.09244). ``head_lr_ratio``: how many times as fast as all other weights the head learns.
    """

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        rewards = scores.of_documents(model, batch)[:, 0]
        chosen, rejected = rewards[0::2], rewards[1::2]
        of_pairs = pair_loss(chosen, rejected, batch["margin"][0::2], center_rewards_coefficient)
        measured = torch.cat([rewards.detach(), rewards.new_full((1,), -torch.inf)])  # never empty
        return {
            "loss": of_pairs.sum(),
            "pairs": torch.full((), len(of_pairs), device=rewards.device),
            "accuracy": (chosen > rejected).sum(),
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
            "largest": measured.max(),
            "largest_negative": torch.cat([-rewards.detach(), measured[-1:]]).max(),
            **unit_sums_of_sources(batch, of_pairs),
        }

    return Task(
        name="reward",
        packable=True,
        encode=encode,
        prompt=scores.no_prompt,
        loss=loss,
        metrics=metrics,
        divisors={"loss": "units"},
        unit=2,
        values=("margin",),
        head=ScoreHead(("reward",), "regression", lr_ratio=head_lr_ratio),
        truncates=False,
        maxima=("largest", "largest_negative"),
        train_metrics=("loss", "accuracy", "margin"),
        summary=("accuracy", "margin"),
        measures={
            "loss": "minimize",
            "accuracy": "maximize",
            "margin": "maximize",
            "mean_reward": None,
            "min_reward": None,
            "max_reward": None,
        },
    )


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """The loss of each pair (pairs,); ``margin``: https://arxiv.org/abs/2307.09288, equation 2."""
    return -logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss; per pair the share whose chosen answer has the larger reward (``accuracy``) and the mean difference of the
    rewards (``margin``); mean, smallest and largest reward of all answers."""
    pairs = max(sums["pairs"], 1.0)
    return {
        "loss": sums["loss"] / pairs,
        "accuracy": sums["accuracy"] / pairs,
        "margin": (sums["chosen"] - sums["rejected"]) / pairs,
        "mean_reward": (sums["chosen"] + sums["rejected"]) / (2 * pairs),
        "min_reward": -sums["largest_negative"],
        "max_reward": sums["largest"],
    }


def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
    """The conversation with the chosen answer, and with the rejected one; a pair that is too long is dropped."""
    if not isinstance(example, dict) or not {"chosen", "rejected"} <= example.keys():
        raise misfit(example, "pairs (data/format=preference: {prompt, chosen, rejected})")
    more = options(example)
    pair = [scores.tokens([*example["prompt"], example[side]], tokenizer, more) for side in ("chosen", "rejected")]
    if pair[0] == pair[1]:
        raise DataError(Fault("", "the chosen and the rejected answer have the same tokens", "leave the row out"))
    return [scores.features(ids, margin=float(example.get("margin", 0.0))) for ids in pair]
