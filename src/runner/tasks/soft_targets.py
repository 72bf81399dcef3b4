"""The divergence of a model from a teacher at each trained position, with its gradient, a chunk of logits at a time.

S is the model's distribution of the next token and T the teacher's, both at ``temperature`` and over the tokens that
both vocabularies have (some models pad theirs). D is the generalized Jensen-Shannon divergence, equation 1 of
https://arxiv.org/abs/2306.13649: KL(T‖S) with beta 0, KL(S‖T) with beta 1, else beta KL(T‖M) + (1 - beta) KL(S‖M) with
M = beta T + (1 - beta) S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from runner.data.packing import IGNORED

AT_ONCE = {"cpu": (1024, 2**21), "gpu": (2048, 2**23)}
"""Positions whose logits of the teacher exist at the same time, and values of a float32 copy; see ``cross_entropy``."""
COPIES = 8


@dataclass(frozen=True, eq=False)
class Soft:
    """The loss of a token: alpha D temperature² + (1 - alpha) cross entropy (https://arxiv.org/abs/1503.02531)."""

    logits: Callable[[Tensor, int], Tensor]
    """(numbers of trained positions (n,), size of the model's vocabulary V) → the teacher's logits (n, at most V)."""
    beta: float
    alpha: float
    temperature: float
    before: int | Tensor = 0
    """How many trained positions of the batch come before these."""

    def after(self, labels: Tensor) -> Soft:
        """For the positions that follow those with ``labels``."""
        return replace(self, before=self.before + (labels != IGNORED).sum())


def of_top(ids: Tensor, log_probabilities: Tensor) -> Callable[[Tensor, int], Tensor]:
    """``Soft.logits`` of the most likely tokens (trained, k) alone: the others have no probability."""

    def logits(numbers: Tensor, size: int) -> Tensor:
        rest = torch.full((len(numbers), size), -torch.inf, device=ids.device)
        return rest.scatter_(1, ids[numbers].long(), log_probabilities[numbers].float())

    return logits


def of_states(states: Tensor, head: Any) -> Callable[[Tensor, int], Tensor]:
    """``Soft.logits`` from the teacher's hidden states (trained, h) and its LM head, or from its logits without one."""

    def logits(numbers: Tensor, size: int) -> Tensor:
        part = states[numbers]
        with torch.no_grad():
            return (part if head is None else head(part.to(head.weight.dtype)))[:, :size]

    return logits


def working_bytes(vocabulary: int, size: int, device: str) -> int:
    """Bytes of the teacher's logits, ``size`` each, and of the float32 copies of both in ``losses_``."""
    positions, values = AT_ONCE["cpu" if device == "cpu" else "gpu"]
    return positions * vocabulary * size + COPIES * min(values, positions * vocabulary) * 4


def losses_(logits: Tensor, targets: Tensor, soft: Soft, *, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, correct predictions, cross entropy, D), each (n,), of logits (n, V); rows without a label give 0.

    ``needs_grad``: overwrite the logits with the gradient of the loss.
    """
    positions, values = AT_ONCE["cpu" if logits.device.type == "cpu" else "gpu"]
    at_once = positions, max(1, values // logits.shape[1])
    count = len(logits)
    loss, nll, divergence = (torch.zeros(count, dtype=torch.float32, device=logits.device) for _ in range(3))
    correct = torch.zeros(count, dtype=torch.bool, device=logits.device)
    valid = targets != IGNORED
    numbers = (valid.cumsum(0) - 1 + soft.before).clamp(min=0)
    for first in range(0, count, at_once[0]):
        taught = soft.logits(numbers[first : first + at_once[0]], logits.shape[1])
        for start in range(first, min(first + at_once[0], count), at_once[1]):
            here = slice(start, min(start + at_once[1], first + at_once[0]))
            part, labels = logits[here], targets[here].clamp(min=0)[:, None]  # (rows, V), (rows, 1)
            # Not used in training, so ties may count as correct there; this avoids the costly argmax.
            highest = part.amax(-1, keepdim=True) if needs_grad else part.argmax(-1, keepdim=True)
            right = highest == (part.gather(-1, labels) if needs_grad else labels)
            nll[here], divergence[here] = _chunk_(part, taught[start - first : here.stop - first], labels, soft)
            correct[here] = (valid[here, None] & right)[:, 0]
            if needs_grad:
                part.mul_(valid[here, None])
    nll, divergence = (torch.where(valid, each, 0.0) for each in (nll, divergence))
    loss = soft.alpha * soft.temperature**2 * divergence + (1 - soft.alpha) * nll
    return loss, correct, nll, divergence


def _chunk_(part: Tensor, taught: Tensor, labels: Tensor, soft: Soft) -> tuple[Tensor, Tensor]:
    """(cross entropy, D), each (rows,); makes of the logits ``part`` (rows, V) the gradient of the loss."""
    common = taught.shape[1]
    log_s = (part[:, :common].float() / soft.temperature).log_softmax(-1)
    log_t = (taught.float() / soft.temperature).log_softmax(-1)
    divergence, slope = divergence_of(log_s, log_t, soft.beta)
    log_p = log_s if soft.temperature == 1 and common == part.shape[1] else part.float().log_softmax(-1)
    nll = -log_p.gather(-1, labels)[:, 0]
    slope = slope.mul_(soft.alpha * soft.temperature)  # temperature² of the loss, 1 / temperature of the logits inside
    slope = pad(slope, (0, part.shape[1] - common))
    if soft.alpha != 1:
        slope.add_(log_p.exp(), alpha=1 - soft.alpha)
        slope.scatter_add_(1, labels, torch.full_like(labels, soft.alpha - 1, dtype=slope.dtype))
    part.copy_(slope)
    return nll, divergence


def divergence_of(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(D (rows,), its gradient with respect to the logits of S (rows, V)) from log-probabilities (rows, V)."""
    s, t = log_s.exp(), log_t.exp()
    if beta == 0:
        return _expected(t, log_t, log_s), s - t
    log_m = log_t if beta == 1 else torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    inside = log_s - log_m
    of_s = (s * inside).sum(-1, keepdim=True)  # KL(S‖M)
    slope = s * (inside - of_s)
    if beta == 1:
        return of_s[:, 0], slope
    return beta * _expected(t, log_t, log_m) + (1 - beta) * of_s[:, 0], (1 - beta) * slope


def _expected(t: Tensor, log_t: Tensor, log_other: Tensor) -> Tensor:
    """KL(T‖other) (rows,); tokens without probability under T give 0."""
    return (t * (log_t - log_other).masked_fill_(t == 0, 0.0)).sum(-1)
