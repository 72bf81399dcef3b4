"""The losses of rows of logits, with their gradient: cross entropy, and the terms that are computed with it."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runner.data.packing import IGNORED
from runner.models.kernels import buffers
from runner.tasks import soft_targets
from runner.tasks.soft_targets import Soft

CHUNK_VALUES, CPU_CHUNK_VALUES = 2**25, 2**22
"""Logits per float32 chunk: 128 MiB on a GPU (few kernel launches), 16 MiB on a CPU (stays in the cache)."""


@dataclass(frozen=True)
class Shaping:
    """Terms of a loss that need the logits of a token: they are computed together with the cross entropy."""

    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary (https://arxiv.org/abs/1512.00567, section 7)."""
    z_loss: float = 0.0
    """Factor of log(Z)², Z the sum of the exponentials of the logits (https://arxiv.org/abs/2204.02311, section 5)."""
    entropy_of: int = 0
    """Of how many of the most likely tokens the entropy is computed, beside the loss."""
    temperature: float = 1.0
    """What the logits are divided by before anything else."""
    soft: Soft | None = None
    """The distributions of a teacher, compared with the model's instead of all of the above."""

    def after(self, labels: Tensor) -> Shaping:
        """For the positions that follow those with ``labels``."""
        return self if self.soft is None else replace(self, soft=self.soft.after(labels))


PLAIN = Shaping()


def cross_entropy_(logits: Tensor, targets: Tensor, shaping: Shaping, *, needs_grad: bool) -> tuple[Tensor, ...]:
    """(loss (n,), correct predictions (n,)); shaped: also (cross entropy (n,), ``TokenLosses.extra`` (n,)).

    ``needs_grad``: overwrite ``logits`` (n, V) with the gradient of the loss. Computed in float32, a chunk of rows at a
    time. Rows without a label have a loss of 0 and are not correct.
    """
    if shaping.soft is not None:
        return soft_targets.losses_(logits, targets, shaping.soft, needs_grad=needs_grad)
    if needs_grad and shaping == PLAIN and type(logits) is Tensor and has_kernel(logits.device, logits.dtype):
        from runner.models.kernels import loss_kernel

        return loss_kernel.losses_(logits, targets, IGNORED)
    return by_operations_(logits, targets, shaping, needs_grad=needs_grad)


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``kernels/loss_kernel`` computes the plain loss on this device; tried once."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from runner.models.kernels import loss_kernel

    def reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return by_operations_(logits, targets, PLAIN, needs_grad=True)

    return loss_kernel.is_right(device, dtype, reference, IGNORED)


def by_operations_(logits: Tensor, targets: Tensor, shaping: Shaping, *, needs_grad: bool) -> tuple[Tensor, ...]:
    """As ``cross_entropy_``, by PyTorch's operations, in as few passes over the logits as they allow: two maxima,
    softmax and, for the gradient, a product."""
    nll = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    correct = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    loss, entropy = (torch.zeros_like(nll), torch.zeros_like(nll)) if shaping != PLAIN else (nll, nll)
    values_at_once = CPU_CHUNK_VALUES if logits.device.type == "cpu" else CHUNK_VALUES
    rows = max(1, values_at_once // logits.shape[1])
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        part, labels = logits[here], targets[here]
        valid, labels = (labels != IGNORED)[:, None], labels.clamp(min=0)[:, None]  # (rows, 1)
        chosen, highest = part.gather(-1, labels).float(), part.amax(-1, keepdim=True).float()
        # `correct` is not used in training, so ties may count as correct; this avoids the costly argmax.
        right = chosen == highest if needs_grad else part.argmax(-1, keepdim=True) == labels
        probabilities = buffers.take("probabilities", part.shape, part, torch.float32)  # (rows, V)
        torch.softmax(part, -1, dtype=torch.float32, out=probabilities)
        # The highest probability is 1 / sum(exp(logits - highest)), at least 1 / V.
        nll[here] = torch.where(valid, highest - chosen - probabilities.amax(-1, keepdim=True).log(), 0.0)[:, 0]
        correct[here] = (valid & right)[:, 0]
        if shaping != PLAIN:
            added, entropy[here] = _shape_(probabilities, part, nll[here, None] + chosen, chosen, shaping)
            loss[here] = torch.where(valid[:, 0], nll[here] + added, 0.0)
        if needs_grad:
            share = 1.0 - shaping.label_smoothing
            probabilities[torch.arange(len(labels), device=labels.device), labels[:, 0]] -= share
            torch.mul(probabilities, valid, out=part)  # d nll / d logits = softmax - one-hot
    return (nll, correct) if shaping == PLAIN else (loss, correct, nll, entropy)


def _shape_(
    probabilities: Tensor, logits: Tensor, log_z: Tensor, chosen: Tensor, shaping: Shaping
) -> tuple[Tensor, Tensor]:
    """(what is added to the cross entropy (rows,), entropy of the most likely tokens (rows,)).

    Makes of ``probabilities`` (rows, V) the gradient but for the label's share. ``log_z``, ``chosen``: (rows, 1).
    """
    added = shaping.z_loss * log_z.square()
    if shaping.z_loss:
        probabilities.mul_(1.0 + 2.0 * shaping.z_loss * log_z)
    if shaping.label_smoothing:
        added = added + shaping.label_smoothing * (chosen - logits.mean(-1, keepdim=True, dtype=torch.float32))
        probabilities.sub_(shaping.label_smoothing / logits.shape[1])
    if not shaping.entropy_of:
        return added[:, 0], torch.zeros_like(added[:, 0])
    likely = logits.topk(min(shaping.entropy_of, logits.shape[1]), -1).values.float().log_softmax(-1)
    return added[:, 0], -(likely.exp() * likely).sum(-1)
