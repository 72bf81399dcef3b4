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

        if not isinstance(example, list):
            kind = "plain text" if isinstance(example, str) else "rows of another task"
            raise DataError(
                Fault(
                    "data.format",
                    f"gives {kind}, but task=sft needs conversations",
                    "use task=pretrain, or a conversation format (data/format=messages, alpaca, …)",
                )
            )
        return [chat_template.encode(example, tokenizer, train_on)]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        from runner.data import chat_template

        assert isinstance(example, list)
        answers = (i for i, turn in enumerate(example) if turn["role"] == "assistant" and turn.get("train", True))
        if not (answer := next(answers, 0)):
            return None
        return chat_template.prompt(example[:answer], tokenizer), str(example[answer]["content"])

    return Task("sft", True, encode, prompt, token_loss, token_metrics)
