"""Reward functions to try task=grpo with."""

from __future__ import annotations

from typing import Any


def lowercase_share(completions: list[Any], **_: Any) -> list[float]:
    """The share of lower-case letters in each answer: easy to learn, also for a model with random weights."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [sum(letter in "abcdefghijklmnopqrstuvwxyz" for letter in text) / max(len(text), 1) for text in texts]
