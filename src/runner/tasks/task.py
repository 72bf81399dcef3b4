"""The training objective (task): how examples are encoded, which loss is computed, which metrics are reported.

``Task.loss`` returns sums, not means, so that the train loop averages exactly over all trained tokens of a step,
whatever the number of micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


from runner.data.examples import Example, Features


@dataclass(frozen=True)
class Task:
    """The interface between the train loop and a training objective."""

    name: str
    packable: bool
    """Whether several examples may share a row of a batch."""
    encode: Callable[[Example, Any, int], list[Features]]
    """(example, tokenizer, max_length) → features; ``labels`` are -100 at untrained positions."""
    prompt: Callable[[Example, Any], tuple[str, str] | None]
    """(example, tokenizer) → (prompt, reference continuation) for generated samples; None if the example has none."""
    loss: Callable[[Any, dict[str, Any]], dict[str, Tensor]]
    """(model, batch) → sums; at least ``loss`` and its divisor ``count``."""
    metrics: Callable[[dict[str, float]], dict[str, float]]
    """Sums of a whole evaluation → metrics by name, without the prefix ``eval/``."""


def token_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss (nats per trained token), perplexity and next-token accuracy."""
    loss = sums["loss"] / sums["count"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sums["correct"] / sums["count"],
    }


def token_loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Summed next-token cross entropy of a batch, see ``cross_entropy.sums``."""
    from runner.models.kernels import attention
    from runner.tasks import cross_entropy

    inputs = attention.inputs(batch, batch["packed"], model)
    labels = batch["labels"].reshape(inputs["input_ids"].shape)
    return cross_entropy.sums(model, {**inputs, "labels": labels, "trained_at": batch.get("trained_at")})


def predictions(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and targets (n,) of the trained positions, for a loss of your own.

    ``token_loss`` needs less memory: it never holds all logits at once.
    """
    from runner.data.packing import IGNORED
    from runner.models.kernels import attention
    from runner.tasks import cross_entropy

    arguments = attention.inputs(batch, batch["packed"], model)
    inputs = {name: arguments[name] for name in cross_entropy.MODEL_INPUTS if arguments.get(name) is not None}
    labels = batch["labels"].reshape(inputs["input_ids"].shape)
    logits, targets = cross_entropy.trained_logits(model, inputs, labels)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    trained = targets != IGNORED
    return logits[trained], targets[trained]
