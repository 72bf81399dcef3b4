"""A task: what the train loop needs to know about an objective.

Sums (not means) are what the loop asks for, so that accumulation and ranks average exactly: over the trained tokens of
the whole step.
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
    """The seam between the train loop and what is being learnt."""

    name: str
    packable: bool
    """Whether several examples may share a row of a batch."""
    encode: Callable[[Example, Any, int], list[Features]]
    """(example, tokenizer, max_length) → features; ``labels`` hold -100 where nothing is trained."""
    prompt: Callable[[Example, Any], tuple[str, str] | None]
    """(example, tokenizer) → (text to continue, what followed there), for the samples; None where it has none."""
    loss: Callable[[Any, dict[str, Any]], dict[str, Tensor]]
    """(model, batch) → sums: at least ``loss`` and the ``count`` it is to be divided by."""
    metrics: Callable[[dict[str, float]], dict[str, float]]
    """The sums of a whole evaluation → metrics by name, without the ``eval/`` before it."""


def token_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss (nats per trained token), perplexity and accuracy of the next token."""
    loss = sums["loss"] / sums["count"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sums["correct"] / sums["count"],
    }


def token_loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    from runner.models.kernels import attention
    from runner.tasks import cross_entropy

    asked = attention.inputs(batch, batch["packed"], model)
    labels = batch["labels"].reshape(asked["input_ids"].shape)
    return cross_entropy.sums(model, {**asked, "labels": labels, "trained_at": batch.get("trained_at")})


def predictions(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and targets (n,) of the trained positions, for a loss of your own.

    ``token_loss`` needs less memory: it never holds all logits at once.
    """
    from runner.data.packing import IGNORED
    from runner.models.kernels import attention
    from runner.tasks import cross_entropy

    found = attention.inputs(batch, batch["packed"], model)
    inputs = {name: found[name] for name in cross_entropy.MODEL_INPUTS if found.get(name) is not None}
    labels = batch["labels"].reshape(inputs["input_ids"].shape)
    logits, targets = cross_entropy.trained_logits(model, inputs, labels)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    trained = targets != IGNORED
    return logits[trained], targets[trained]
