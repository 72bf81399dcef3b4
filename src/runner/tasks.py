"""What a model is trained to do: rows → features, a batch → sums, sums → metrics.

The train loop knows nothing else of a task. Sums (not means) are what it asks for, so that accumulation and ranks
average exactly: over the trained tokens of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, DataError, Fault

if TYPE_CHECKING:
    from torch import Tensor

Features = dict[str, list[int]]
Example = list[dict[str, Any]] | str


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


def sft(*, train_on: Literal["assistant", "last", "all"]) -> Task:
    """Supervised fine-tuning: learn to write the assistant's turns of a conversation."""

    def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
        from runner import chat

        if isinstance(example, str):
            raise DataError(
                Fault(
                    "data.format",
                    "gives plain text, and task=sft trains on conversations",
                    "use task=pretrain, or a format that gives messages (data/format=messages, alpaca, …)",
                )
            )
        return [chat.encode(example, tokenizer, train_on)]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        from runner import chat

        turns = [i for i, message in enumerate(example) if message["role"] == "assistant"]  # type: ignore[index]
        if not turns or turns[0] == 0:
            return None
        return chat.prompt(list(example[: turns[0]]), tokenizer), str(example[turns[0]]["content"])  # type: ignore

    return Task("sft", True, encode, prompt, _loss, token_metrics)


def pretrain(*, append_eos: bool) -> Task:
    """Next-token prediction on plain text; long documents are cut into pieces of ``data.max_length``."""

    def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
        if not isinstance(example, str):
            raise DataError(
                Fault(
                    "data.format",
                    "gives conversations, and task=pretrain trains on plain text",
                    "use task=sft, or data/format=text with data.format.key naming the text's key",
                )
            )
        ids = tokenizer(example, add_special_tokens=True, verbose=False)["input_ids"]
        if append_eos:
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    Fault("task.append_eos", "this tokenizer has no end-of-sequence token", "set it to false", True)
                )
            ids = [*ids, tokenizer.eos_token_id]
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        return [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        words = str(example).split(" ")
        half = min(len(words) // 2, 24)
        return (" ".join(words[:half]), " ".join(words[half : 2 * half])) if half else None

    return Task("pretrain", True, encode, prompt, _loss, token_metrics)


def token_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss (nats per trained token), perplexity and accuracy of the next token."""
    loss = sums["loss"] / sums["count"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sums["correct"] / sums["count"],
    }


def _loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    from runner import attention, loss

    asked = attention.inputs(batch, batch["packed"], model)
    labels = batch["labels"].reshape(asked["input_ids"].shape)
    return loss.sums(model, {**asked, "labels": labels, "trained_at": batch.get("trained_at")})
