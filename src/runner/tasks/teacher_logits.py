"""The logits of a teacher, a second model that is not trained: of the model in memory, or of its most likely tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.tasks import soft_targets
from runner.tasks.task import token_states

IDS, LOG_PROBABILITIES = "teacher_ids", "teacher_log_probabilities"
"""In a batch: the teacher's most likely tokens at each trained position, (trained, k), and their log-probabilities with
the others left out."""
AT_ONCE = 1024
"""Positions whose whole logits exist at the same time in ``top``."""


@dataclass(frozen=True)
class Attached:
    """The teacher in memory. It is no module of the model that learns from it: neither trained nor saved with it."""

    teacher: Any


def attach(model: Any, teacher: Any) -> None:
    """Make this teacher the source of ``logits`` for the model."""
    model.attached = Attached(teacher)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> Callable[[Tensor, int], Tensor]:
    """The teacher's logits at the trained positions of a batch, as ``soft_targets.Soft`` needs them."""
    if IDS in batch:
        return soft_targets.of_top(batch[IDS], batch[LOG_PROBABILITIES])
    return soft_targets.of_states(*token_states(model.attached.teacher, batch))


@torch.no_grad()
def top(teacher: Any, batch: dict[str, Any], count: int, size: int) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities among them), each (trained, count), of the most likely of the first ``size`` tokens."""
    logits_of = soft_targets.of_states(*token_states(teacher, batch))
    chunks = torch.arange(batch["trained"], device=batch["labels"].device).split(AT_ONCE)
    values, ids = zip(*(logits_of(numbers, size).topk(count, -1) for numbers in chunks), strict=True)
    return torch.cat(ids).int(), torch.cat(values).float().log_softmax(-1)
