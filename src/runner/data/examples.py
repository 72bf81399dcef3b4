"""Types shared by dataset formats and tasks: the example parsed from a row, and its token sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Example = list[dict[str, Any]] | str
"""A conversation (a list of messages, each with ``role`` and ``content``) or plain text."""
Features = dict[str, list[int]]
"""One token sequence: ``input_ids`` and ``labels`` of equal length, not shifted; label -100: no loss."""


class Encoder(Protocol):
    """The part of a task that ``data.dataset`` uses."""

    @property
    def name(self) -> str: ...

    @property
    def encode(self) -> Callable[[Example, Any, int], list[Features]]:
        """(example, tokenizer, max_length) → token sequences."""

    @property
    def prompt(self) -> Callable[[Example, Any], tuple[str, str] | None]:
        """(example, tokenizer) → (prompt, reference answer) for the samples; None if the example has no prompt."""
