"""Types shared by dataset formats and tasks: the example parsed from a row, and its token sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from runner.errors import DataError, Fault

Example = list[dict[str, Any]] | str | dict[str, Any]
"""A conversation (a list of messages, each with ``role`` and ``content``), plain text, or a dict with a conversation
under ``messages``, or under ``prompt`` with what a task needs beside it: ``chosen`` and ``rejected``, the two answers
of a pair, or ``label``, where the prompt may be plain text. A dict may have ``tools``, ``chat_template_kwargs`` and,
with ``messages``, the ``weight`` of the row."""
Format = Callable[[Mapping[str, Any]], Example | None]
"""A row → its example; None: the row is left out."""
Features = dict[str, Any]
"""One token sequence: lists ``input_ids`` and ``labels`` of equal length, not shifted; label -100: no loss.
``weights``, if there are any: those of the labels. With a model that reads images ``images``, see ``data.images``, and
``image_tokens``, how many of the tokens stand for them. Further keys are numbers of the sequence, see
``Encoder.values``, and with ``Encoder.answers`` a text ``record``."""


class Chat(NamedTuple):
    """A conversation, and what its row has beside it."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]
    """``tools``, and variables of the chat template."""
    weight: float = 1.0


def chat(example: Example) -> Chat | None:
    """The conversation of an example; None if it is something else."""
    if isinstance(example, list):
        return Chat(example, {})
    if isinstance(example, str) or "messages" not in example:
        return None
    return Chat(example["messages"], options(example), float(example.get("weight", 1.0)))


def options(example: dict[str, Any]) -> dict[str, Any]:
    """``tools`` of an example, and variables of the chat template."""
    tools = {"tools": example["tools"]} if "tools" in example else {}
    return {**tools, **example.get("chat_template_kwargs", {})}


@dataclass(frozen=True)
class Answers:
    """The answers that a task lets the model write for each row before a step."""

    per_row: int
    most_tokens: int
    of_prompts: bool = True
    """Whether the rows are prompts alone; False: they have answers, too, and the model answers in some steps."""


def misfit(example: Example, needed: str) -> DataError:
    """The error of an example of another task, with the task that it fits."""
    if isinstance(example, str):
        kind, fits = "plain text", "pretrain"
    elif chat(example) is not None:
        kind, fits = "conversations", "sft"
    elif "chosen" in example:
        kind, fits = "pairs of a chosen and a rejected answer", "dpo"
    elif "completion" in example:
        kind, fits = "answers with a verdict", "kto"
    elif "columns" in example:
        kind, fits = "prompts without answers", "grpo"
    elif "label" in example:
        kind, fits = "texts with a label", "classify"
    else:
        kind, fits = "rows of another task", ""
    remedy = f"use task={fits}, or " if fits else "use "
    problem = f"gives {kind}, but this task needs {needed}"
    return DataError(Fault("data.format", problem, f"{remedy}a data/format that gives {needed}"))


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
    def weights(self) -> bool:
        """Whether the task uses the weights of labels."""

    @property
    def answers(self) -> Answers | None:
        """None if the model writes none. ``of_prompts``: the rows have no labels, and each has a text ``record``."""

    @property
    def needs_labels(self) -> bool:
        """Whether a sequence without a label is left out."""

    @property
    def is_scored(self) -> bool:
        """Whether each sequence gets numbers at its last token, instead of losses of its labels."""

    @property
    def truncates(self) -> bool:
        """Whether a sequence may be cut to ``data.max_length``; if not, its unit is dropped."""

    @property
    def settle(self) -> Callable[[Sequence[Any]], Encoder] | None:
        """(training examples) → the task with what the data decide; None: they decide nothing."""

    @property
    def settled(self) -> Mapping[str, Any]:
        """The YAML keys that the data have decided, such as the names of classes."""

    @property
    def prompt(self) -> Callable[[Example, Any], tuple[str, str] | None]:
        """(example, tokenizer) → (prompt, reference answer) for the samples; None if the example has no prompt."""
