"""Types shared by dataset formats and tasks: the example parsed from a row, and its token sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Example = list[dict[str, Any]] | str | dict[str, Any]
"""A conversation (a list of messages, each with ``role`` and ``content``), plain text, or a dict with a conversation
under ``prompt`` and what a task needs beside it: ``chosen`` and ``rejected``, the two answers of a pair."""
Features = dict[str, Any]
"""One token sequence: lists ``input_ids`` and ``labels`` of equal length, not shifted; label -100: no loss.
Further keys are numbers of the sequence, see ``Encoder.values``."""


class Encoder(Protocol):
    """The part of a task that ``data.dataset`` uses."""

    @property
    def name(self) -> str: ...

    @property
    def encode(self) -> Callable[[Example, Any, int], list[Features]]:
        """(example, tokenizer, max_length) → token sequences, a multiple of ``unit``."""

    @property
    def unit(self) -> int:
        """How many consecutive sequences stay together in one micro-batch: 2 for preference pairs."""

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the numbers that each sequence has."""

    @property
    def prompt(self) -> Callable[[Example, Any], tuple[str, str] | None]:
        """(example, tokenizer) → (prompt, reference answer) for the samples; None if the example has no prompt."""
