"""Pairs of answers to one prompt: how they are encoded, and the numbers of each pair that preference losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runner.data.examples import Example, Features, misfit, options
from runner.data.packing import answer_start
from runner.errors import DataError, Fault
from runner.tasks.task import Measures

MEASURES: Measures = {
    "loss": "minimize", "nll": "minimize", "rewards/accuracies": "maximize", "rewards/margins": "maximize",
    "rewards/chosen": "maximize", "rewards/rejected": "minimize", "logps/chosen": None, "logps/rejected": None,
}  # fmt: skip
"""The metrics of an evaluation, and which way each improves."""


@dataclass(frozen=True)
class Pairs:
    """Summed log-probabilities (s), those of the reference (r) and token counts (n) of each pair, (pairs,) float32.

    ``w``: the chosen (winning) answer, ``l``: the rejected (losing) one.
    """

    s_w: Tensor
    s_l: Tensor
    r_w: Tensor
    r_l: Tensor
    n_w: Tensor
    n_l: Tensor

    @classmethod
    def of(cls, sums: Tensor, tokens: Tensor, reference: Tensor) -> Pairs:
        """From numbers of documents (2 * pairs,): chosen, rejected, chosen, …"""
        (s_w, s_l), (r_w, r_l), (n_w, n_l) = ((each[0::2], each[1::2]) for each in (sums, reference, tokens))
        return cls(s_w, s_l, r_w, r_l, n_w, n_l)


def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
    """The conversation with the chosen answer, and with the rejected one; only the last answer has labels."""
    from runner.data import chat_template

    if not isinstance(example, dict) or not {"chosen", "rejected"} <= example.keys():
        raise misfit(example, "pairs (data/format=preference: {prompt, chosen, rejected})")
    refuse_margin(example)
    more = options(example)
    pair = [
        chat_template.encode([*example["prompt"], example[side]], tokenizer, "last", options=more)
        for side in ("chosen", "rejected")
    ]
    if pair[0]["input_ids"] == pair[1]["input_ids"]:
        raise DataError(Fault("", "the chosen and the rejected answer have the same tokens", "leave the row out"))
    prompts = [feature["input_ids"][: answer_start(feature["labels"])] for feature in pair]
    if prompts[0] != prompts[1]:
        problem = "the chat template renders the prompt differently for the two answers"
        raise DataError(Fault("", problem, "leave the row out, or use another model.chat_template"))
    if pair[0]["input_ids"][:max_length] == pair[1]["input_ids"][:max_length]:
        return []  # what distinguishes the answers is cut off: nothing to learn
    return pair if all(answer_start(feature["labels"]) < max_length for feature in pair) else []


def refuse_margin(example: dict[str, Any]) -> None:
    """Refuse a margin where no loss uses it.

    Raises:
        DataError: the example has one.
    """
    if "margin" in example:
        remedy = "use task=reward, or train without it knowingly: +data.format.ignore=[margin]"
        raise DataError(Fault("data.format", "the row has a margin, which this task does not use", remedy))


def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
    """The rendered prompt and the chosen answer."""
    from runner.data import chat_template

    assert isinstance(example, dict)
    return chat_template.prompt(list(example["prompt"]), tokenizer, options(example)), str(example["chosen"]["content"])
