"""Log-probabilities of whole documents, for losses that compare answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runner.tasks.task import token_losses


def sums(model: Any, batch: dict[str, Any]) -> Tensor:
    """The summed log-probability of the labels of each document, (documents,) float32."""
    return of_documents(model, batch)[0]


def of_documents(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(summed log-probability of the labels, number of labels) of each document, (documents,) float32.

    Differentiable. Logits are never held whole, and documents need no padding.
    """
    labels = batch["labels_per_document"]
    log_probabilities = -token_losses(model, batch).nll
    return torch.segment_reduce(log_probabilities, "sum", lengths=labels), labels.float()  # deterministic on GPUs too
