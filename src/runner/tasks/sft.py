"""Supervised fine-tuning (SFT) on conversations."""

from __future__ import annotations

from typing import Any, Literal

from runner.data.examples import Example, Features, chat, misfit
from runner.tasks.task import Task, token_loss, token_metrics


def sft(*, train_on: Literal["assistant", "last", "all"], reasoning: bool = True) -> Task:
    """Supervised fine-tuning on the assistant turns of a conversation; ``train_on`` selects the trained turns.

    ``reasoning``: whether the reasoning of an answer is trained, too.
    """

    def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
        from runner.data import chat_template

        if (talk := chat(example)) is None:
            raise misfit(example, "conversations (messages, sharegpt, alpaca, prompt_completion)")
        return [
            chat_template.encode(
                talk.messages, tokenizer, train_on, options=talk.options, reasoning=reasoning, weight=talk.weight
            )
        ]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        from runner.data import chat_template

        talk = chat(example)
        assert talk is not None
        turns = enumerate(talk.messages)
        answers = (i for i, turn in turns if turn["role"] == "assistant" and turn.get("weight", 1) and turn["content"])
        if not (answer := next(answers, 0)):
            return None
        prompt = chat_template.prompt(talk.messages[:answer], tokenizer, talk.options)
        return prompt, str(talk.messages[answer]["content"])

    return Task("sft", True, encode, prompt, token_loss, token_metrics, weights=True)
