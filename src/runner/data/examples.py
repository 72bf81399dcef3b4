"""What passes from a dataset format to a task: the example that a row becomes, and the token sequences made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Example = list[dict[str, Any]] | str
"""A conversation (a list of messages, each with ``role`` and ``content``) or plain text."""
Features = dict[str, list[int]]
"""One token sequence: ``input_ids`` and ``labels`` of equal length; -100 marks a position without loss."""


class Encoder(Protocol):
    """The part of a task that ``data.dataset`` calls."""

    @property
    def name(self) -> str: ...

    @property
    def encode(self) -> Callable[[Example, Any, int], list[Features]]:
        """(example, tokenizer, max_length) → token sequences."""

    @property
    def prompt(self) -> Callable[[Example, Any], tuple[str, str] | None]:
        """(example, tokenizer) → (prompt, reference answer) for the samples; None where the example has no prompt."""
