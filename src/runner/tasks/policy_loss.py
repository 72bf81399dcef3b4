"""The loss of each token under a policy gradient, and its sum over answers; see ``grpo`` for the papers."""

from __future__ import annotations

import torch
from torch import Tensor


def token_loss(
    new: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    start: Tensor | None,
    loss_type: str,
    level: str,
    beta: float,
    lower: float | None,
    upper: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, whether it is clipped, KL to the start or None) of each token (tokens,), for rloo of each answer.

    ``new``: log-probabilities of the tokens; ``log_ratio``: their difference to the policy that wrote the answers;
    ``start``: log-probabilities under the reference. ``advantage`` and ``lengths``: (answers,).
    """
    if loss_type == "rloo":  # the probability of the whole answer
        log_ratio, spread = torch.segment_reduce(log_ratio, "sum", lengths=lengths), advantage
    else:
        spread = advantage.repeat_interleave(lengths)
        if level == "sequence":
            means = torch.segment_reduce(log_ratio, "sum", lengths=lengths) / lengths.clamp(min=1)
            log_ratio = means.repeat_interleave(lengths)
    ratio = log_ratio.exp()
    low, high = (1 - lower if lower is not None else None, 1 + upper if upper is not None else None)
    if loss_type == "cispo":
        most = torch.full_like(ratio, torch.inf) if upper is None else torch.full_like(ratio, upper)
        loss, clipped = -torch.minimum(ratio, most).detach() * spread * new, ratio > most
    elif low is None and high is None:
        loss, clipped = -ratio * spread, torch.zeros_like(ratio, dtype=torch.bool)
    else:
        loss = -torch.minimum(ratio * spread, ratio.clamp(low, high) * spread)
        clipped = ((ratio < (low or 0.0)) & (spread < 0)) | ((ratio > (high or torch.inf)) & (spread > 0))
    if start is None:
        return loss, clipped, None
    difference = start - new
    kl = difference.exp() - difference - 1  # k3 of http://joschu.net/blog/kl-approx.html
    return loss + beta * kl * ratio, clipped, kl


def reduced(loss: Tensor, lengths: Tensor, loss_type: str, most_tokens: int) -> Tensor:
    """The sum (), to be divided by the tokens (dapo, cispo) or the answers (others) of the step."""
    match loss_type:
        case "grpo":
            return (torch.segment_reduce(loss, "sum", lengths=lengths) / lengths.clamp(min=1)).sum()
        case "dr_grpo":
            return loss.sum() / most_tokens
        case _:
            return loss.sum()
