"""The numbers that a score head gives whole documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from runner.data.conversation import NO_OPTIONS
from runner.data.examples import Features
from runner.data.packing import IGNORED
from runner.errors import DataError, Fault


def of_documents(model: Any, batch: dict[str, Any]) -> Tensor:
    """The outputs of the head at the last token of each document, (documents, outputs) float32; differentiable."""
    from runner.models.kernels import attention, score_head

    outputs = model(**attention.inputs(batch, batch["packed"], model)).logits
    if score_head.is_encoder(model):
        return outputs[: batch["documents"]].float()
    return outputs.flatten(0, 1).index_select(0, batch["last_at"]).float()


def no_prompt(*_: Any) -> None:
    """A model that gives scores has no samples of text."""


def tokens(messages: list[dict[str, Any]], tokenizer: Any, options: Mapping[str, Any] = NO_OPTIONS) -> list[int]:
    """The token ids of a conversation that is scored at its end.

    Raises:
        ConfigError, DataError: as ``chat_template.encode``; or a message has a weight, which has no effect.
    """
    from runner.data import chat_template

    if any("weight" in message for message in messages):
        remedy = "leave the row out, or train without the key knowingly: +data.format.ignore=[weight]"
        raise DataError(Fault("", "has a weight of a message, but the whole conversation is scored", remedy))
    ids: list[int] = chat_template.encode(messages, tokenizer, "all", options=options)["input_ids"]
    return ids


def features(ids: list[int], **values: float) -> Features:
    """A token sequence with the numbers of its document; its last token, where it is scored, counts as trained."""
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:], **values}
