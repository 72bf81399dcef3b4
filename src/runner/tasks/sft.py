"""Supervised fine-tuning (SFT) on conversations."""

from __future__ import annotations

from typing import Any, Literal

from runner.data.examples import Example, Features
from runner.errors import DataError, Fault
from runner.tasks.task import Task, token_loss, token_metrics


def sft(*, train_on: Literal["assistant", "last", "all"]) -> Task:
    """Supervised fine-tuning on the assistant turns of a conversation; ``train_on`` selects the trained turns."""

    def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
        from runner.data import chat_template

        if isinstance(example, str):
            raise DataError(
                Fault(
                    "data.format",
                    "gives plain text, but task=sft needs conversations",
                    "use task=pretrain, or a conversation format (data/format=messages, alpaca, …)",
                )
            )
        return [chat_template.encode(example, tokenizer, train_on)]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        from runner.data import chat_template

        answers = (i for i, turn in enumerate(example) if turn["role"] == "assistant" and turn.get("train", True))  # type: ignore
        answer = next(answers, 0)
        if not answer:
            return None
        return chat_template.prompt(list(example[:answer]), tokenizer), str(example[answer]["content"])  # type: ignore

    return Task("sft", True, encode, prompt, token_loss, token_metrics)
