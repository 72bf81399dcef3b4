"""Cross entropy of the next token, over the trained positions alone.

Logits are the largest tensor of a step: (positions, V). Here they exist for trained positions only, a chunk at a time
where the head is a plain product (see ``head``), else once, in the model's dtype; their gradient is written over them.
Plain cross entropy in float32 keeps up to five such tensors (logits, their float32 copy, log-probabilities, and the
gradients of two of them).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runner.data.packing import IGNORED
from runner.models.kernels import buffers, lm_head

DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", *DOCUMENTS)
CHUNK_VALUES, CPU_CHUNK_VALUES = 2**25, 2**22
"""Logits worked on at once in float32: 128 MiB, as few kernels as possible; 16 MiB on a CPU, which keeps them near."""
HEAD_POSITIONS, CPU_HEAD_POSITIONS = 2048, 1024
"""Positions whose logits are computed at once, where the head is in the loss. Fewer cost time: at each the head's
weight is read, and on a CPU packed, anew (with 128 positions a third of the product's time)."""
EVAL_POSITIONS = 8192
"""Positions of one forward pass without gradients, unless a single row has more."""


def sums(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """``loss`` (nats, summed in float32), ``count`` of trained positions, and how many of them were ``correct``.

    ``batch`` holds ``labels`` (B, T), already shifted (``labels[t]`` is the token after ``input_ids[t]``, -100 where
    nothing is trained), and the model's inputs. The model computes the logits itself, so that what it does behind
    its head (soft-capping, scaling) holds. ``trained_at`` (positions,) says where labels are, if it is known: else
    the device is asked once how many there are.
    """
    asked = {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}
    labels = batch["labels"].reshape(asked["input_ids"].shape)
    if torch.is_grad_enabled() or len(labels) == 1:
        return _sums(model, asked, labels, batch.get("trained_at"))
    rows = max(1, EVAL_POSITIONS // labels.shape[1])
    parts = [
        _sums(model, {name: value[at : at + rows] for name, value in asked.items()}, labels[at : at + rows])
        for at in range(0, len(labels), rows)
    ]
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def rehearsal(model: Any, asked: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """The loss as ``sums`` computes it, with the positions that have logits given: ``kept`` (count,) of each row."""
    offered = {} if _choice_offered(model) == "all" else {"logits_to_keep": kept}
    with _without_head(model) as linear:
        last = model(**asked, **offered, use_cache=False).logits
    return _summed(last, torch.zeros(last.shape[:-1], dtype=torch.int64, device=last.device), linear)[0]


def _sums(model: Any, asked: dict[str, Tensor], labels: Tensor, trained_at: Tensor | None = None) -> dict[str, Tensor]:
    with _without_head(model) as linear:
        if linear is not None and trained_at is not None:
            hidden = model(**asked, use_cache=False).logits[:, -labels.shape[1] :]  # prompt tuning has tokens in front
            last, targets = (each.flatten(0, 1).index_select(0, trained_at) for each in (hidden, labels))
        else:
            last, targets = trained_logits(model, asked, labels, trained_at if len(labels) == 1 else None)
    loss, correct = _summed(last, targets, linear)
    return {"loss": loss, "count": (targets != IGNORED).sum(), "correct": correct}


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[nn.Linear | None]:
    """The model's head, left out while the block runs if it is computed here."""
    found = lm_head.in_loss(model)
    with lm_head.bypassed(found) if found else contextlib.nullcontext():
        yield found


def _summed(last: Tensor, targets: Tensor, linear: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """The loss, and how many were right, from logits, or from what the head is to make them of."""
    last, targets = last.reshape(-1, last.shape[-1]), targets.reshape(-1)
    if linear is not None and not linear.weight.requires_grad:
        loss, correct = _LinearCrossEntropy.apply(last, linear.weight, linear.bias, targets)
    else:
        loss, correct = _CrossEntropy.apply(last if linear is None else linear(last), targets)
    return loss, correct


def trained_logits(
    model: Any, asked: dict[str, Tensor], labels: Tensor, trained_at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of the trained positions (or of more, where the model offers no less), and what they are to predict.

    Without its head the model gives the last hidden states, (…, h) in the place of (…, V).
    """
    trained = labels != IGNORED  # (B, T)
    match _choice_offered(model):
        case "mask" | "positions" if trained_at is not None:
            logits = model(**asked, use_cache=False, logits_to_keep=trained_at).logits
            return logits, labels[:, trained_at]  # (1, positions, V)
        case "mask":
            logits = model(**asked, use_cache=False, logits_to_keep=trained).logits
            return logits, labels[trained]  # (positions, V)
        case "positions":
            kept = trained.any(0).nonzero()[:, 0]  # trained in any row
            logits = model(**asked, use_cache=False, logits_to_keep=kept).logits
            return logits, labels[:, kept]  # (B, kept, V)
        case "all":
            logits = model(**asked, use_cache=False).logits
            return logits[:, -labels.shape[1] :], labels  # (B, T, V): prompt tuning puts virtual tokens in front


def _choice_offered(model: Any) -> Literal["mask", "positions", "all"]:
    """How a model lets its caller choose the positions: each by a mask (transformers 5), columns, or not at all."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompted = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if prompted or "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        return "all"
    home = sys.modules[type(base).forward.__module__]  # not of the class, which fully_shard makes anew
    return "mask" if hasattr(home, "slice_logits_to_keep") else "positions"


class _CrossEntropy(torch.autograd.Function):
    """Summed cross entropy whose gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        buffer = logits.detach()  # same memory, same version counter: autograd refuses if someone else needs the logits
        loss, correct = _cross_entropy_(buffer, targets, needs_grad=ctx.needs_input_grad[0])
        ctx.grad = buffer
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None]:
        grad, ctx.grad = ctx.grad, None  # used up: a second backward pass would scale it twice
        return grad.mul_(scale), None


class _LinearCrossEntropy(torch.autograd.Function):
    """The same from hidden states (n, h) and the weight of the head (V, h), which is not trained.

    The gradient of a chunk is computed with its logits, as in Liger Kernel (https://arxiv.org/abs/2410.10989, 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        device, needs_grad = hidden.device, ctx.needs_input_grad[0]
        computed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        loss = torch.zeros((), dtype=torch.float32, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        ctx.grad = torch.empty_like(hidden) if needs_grad else hidden
        chunks = max(1, -(-len(hidden) // (CPU_HEAD_POSITIONS if device.type == "cpu" else HEAD_POSITIONS)))
        with torch.autocast(device.type, enabled=False):
            weight, bias = weight.to(computed), bias.to(computed) if bias is not None else None
            for given, wanted, grad in zip(*(each.chunk(chunks) for each in (hidden, targets, ctx.grad)), strict=True):
                logits = nn.functional.linear(given.to(computed), weight, bias)
                summed, right = _cross_entropy_(logits, wanted, needs_grad=needs_grad)
                loss, correct = loss + summed, correct + right
                if needs_grad:
                    grad.copy_(logits @ weight)  # by now the logits' grad
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(scale), None, None, None


def _cross_entropy_(logits: Tensor, targets: Tensor, *, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and the number of right guesses; ``needs_grad``: its gradient takes the logits' place.

    Worked on in float32, a chunk of rows at a time, in as few passes over the logits as PyTorch's operations allow:
    two maxima, softmax and, for the gradient, a product.
    """
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    correct = torch.zeros((), dtype=torch.int64, device=logits.device)
    values_at_once = CPU_CHUNK_VALUES if logits.device.type == "cpu" else CHUNK_VALUES
    rows = max(1, values_at_once // logits.shape[1])
    for start in range(0, len(logits), rows):
        part, wanted = logits[start : start + rows], targets[start : start + rows]
        valid, wanted = (wanted != IGNORED)[:, None], wanted.clamp(min=0)[:, None]  # (rows, 1)
        chosen, highest = part.gather(-1, wanted).float(), part.amax(-1, keepdim=True).float()
        # In training nobody asks how many were right: a tie may count for it, and the costly look is left out.
        right = chosen == highest if needs_grad else part.argmax(-1, keepdim=True) == wanted
        probabilities = buffers.take("probabilities", part.shape, part, torch.float32)  # (rows, V)
        torch.softmax(part, -1, dtype=torch.float32, out=probabilities)
        # The highest one is 1 / sum(exp(logits - highest)), and never below 1 / V.
        loss += torch.where(valid, highest - chosen - probabilities.amax(-1, keepdim=True).log(), 0.0).sum()
        correct += (valid & right).sum()
        if needs_grad:
            probabilities[torch.arange(len(wanted), device=wanted.device), wanted[:, 0]] -= 1.0
            torch.mul(probabilities, valid, out=part)  # d loss / d logits = softmax - one-hot
    return loss, correct
