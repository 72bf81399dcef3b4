"""Next-token cross entropy that saves memory: logits are computed for trained positions only.

Logits (positions, V) are the largest tensor of a step. If the LM head is a plain linear layer (see
``models/kernels/lm_head``), logits are computed in chunks; otherwise once, in the model's dtype. Their gradient
overwrites them in place. Plain cross entropy in float32 keeps up to five such tensors: logits, their float32 copy,
log-probabilities, and the gradients of two of them.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runner.data.packing import IGNORED
from runner.models.kernels import base_model, cpu_products, lm_head, varlen_attention
from runner.tasks import logit_losses
from runner.tasks.logit_losses import PLAIN, Shaping

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", *varlen_attention.ARGUMENTS, *base_model.IMAGE_ARGUMENTS)
HEAD_POSITIONS, CPU_HEAD_POSITIONS = 2048, 1024
"""Positions per chunk if the loss computes the LM head. Small chunks are slow: each one reads the head's weight again
and, on a CPU, packs it again (at 128 positions this takes a third of the matrix product's time)."""
EVAL_POSITIONS = 8192
"""Maximum positions of one forward pass without gradients; a single longer row is still one pass."""


@dataclass(frozen=True)
class TokenLosses:
    """Cross entropy of each trained position, in the order of the flattened batch."""

    nll: Tensor
    """(trained,) float32: the negative log-likelihood of the label, in nats. Differentiable unless it is shaped."""
    correct: Tensor
    """(trained,) bool: whether the label is the most likely token."""
    loss: Tensor
    """(trained,) float32: ``nll`` with what the shaping adds to it. Differentiable."""
    extra: Tensor
    """(trained,) float32: entropy, in nats, of the ``Shaping.entropy_of`` most likely tokens; with ``Shaping.soft``,
    the divergence from the teacher; else 0."""


def sums(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return ``loss`` (nats, summed in float32), ``count`` of trained positions, and ``correct`` predictions.

    ``batch`` contains the model's inputs and ``labels`` (B, T), already shifted: ``labels[t]`` is the token after
    ``input_ids[t]``, or -100 if the position is not trained. A model with operations after its head (soft-capping,
    scaling) computes the logits itself. ``trained_at`` (positions,): indices of the trained positions; without it,
    finding them synchronizes with the device once.
    """
    parts = _passes(model, batch, PLAIN)
    counts = [(targets != IGNORED).sum() for _, targets in parts]
    return {
        "loss": torch.stack([losses.loss.sum() for losses, _ in parts]).sum(),
        "count": torch.stack(counts).sum(),
        "correct": torch.stack([losses.correct.sum() for losses, _ in parts]).sum(),
    }


def token_losses(model: Any, batch: Mapping[str, Any], shaping: Shaping = PLAIN) -> TokenLosses:
    """The cross entropy of each trained position; ``batch`` as in ``sums``. Logits are never held whole.

    The gradient of ``loss`` is exact for any function of it: row t of the logits affects ``loss[t]`` alone.
    """
    count = len(batch["trained_at"]) if batch.get("trained_at") is not None else -1
    kept = []
    for losses, targets in _passes(model, batch, shaping):
        trained = slice(None) if len(targets) == count else targets != IGNORED
        kept.append([each[trained] for each in (losses.nll, losses.correct, losses.loss, losses.extra)])
    return TokenLosses(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


def states(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, nn.Linear | None]:
    """(hidden states (trained, h), LM head), or (logits (trained, V), None) if the model has to compute these."""
    kept = []
    for inputs, labels, trained_at in _cut(batch):
        last, targets, linear = _last(model, inputs, labels, trained_at)
        last, targets = last.reshape(-1, last.shape[-1]), targets.reshape(-1)
        kept.append(last if trained_at is not None and len(last) == len(trained_at) else last[targets != IGNORED])
    return torch.cat(kept), linear


def _passes(model: Any, batch: Mapping[str, Any], shaping: Shaping) -> list[tuple[TokenLosses, Tensor]]:
    """(losses, targets), each (n,), of every forward pass: one, or without gradients as many as memory needs."""
    passes = []
    for inputs, labels, trained_at in _cut(batch):
        last, targets, linear = _last(model, inputs, labels, trained_at)
        passes.append((_losses(last, targets, linear, shaping), targets.reshape(-1)))
        shaping = shaping.after(labels)
    return passes


def _cut(batch: Mapping[str, Any]) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor | None]]:
    """(inputs, labels, ``trained_at`` if it is known) of every forward pass."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}
    labels = batch["labels"].reshape(inputs["input_ids"].shape)
    is_whole = any(name in inputs for name in base_model.IMAGE_ARGUMENTS)  # their tensors have no dimension of rows
    is_whole |= "position_ids" in inputs and inputs["position_ids"].dim() > 2  # nor have these, see grid_positions
    if torch.is_grad_enabled() or len(labels) == 1 or is_whole:
        yield inputs, labels, batch.get("trained_at")
        return
    rows = max(1, EVAL_POSITIONS // labels.shape[1])
    for at in range(0, len(labels), rows):
        yield {name: value[at : at + rows] for name, value in inputs.items()}, labels[at : at + rows], None


def rehearsal(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """The loss of ``sums``, without labels: logits are computed at ``positions`` (count,) of each row.

    Used to measure memory with fake tensors.
    """
    offered = {} if _choice_offered(model) == "all" else {"logits_to_keep": positions}
    with _without_head(model) as linear:
        last = model(**inputs, **offered, use_cache=False).logits
    return _losses(last, torch.zeros(last.shape[:-1], dtype=torch.int64, device=last.device), linear, PLAIN).loss.sum()


def _last(
    model: Any, inputs: dict[str, Tensor], labels: Tensor, trained_at: Tensor | None
) -> tuple[Tensor, Tensor, nn.Linear | None]:
    """(hidden states or logits, targets, LM head if it is left to the loss) of one forward pass."""
    with _without_head(model) as linear:
        if linear is not None and trained_at is not None:
            hidden = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :]  # prompt tuning prepends tokens
            last, targets = (each.flatten(0, 1).index_select(0, trained_at) for each in (hidden, labels))
        else:
            last, targets = trained_logits(model, inputs, labels, trained_at if len(labels) == 1 else None)
    return last, targets, linear


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[nn.Linear | None]:
    """Bypass the LM head while the block runs and yield it, if the loss computes it; else yield None."""
    head = lm_head.in_loss(model)
    with lm_head.bypassed(head) if head else contextlib.nullcontext():
        yield head


def _losses(last: Tensor, targets: Tensor, linear: nn.Linear | None, shaping: Shaping) -> TokenLosses:
    """The losses (n,) from logits, or from hidden states if ``linear`` (the LM head) is given."""
    last, targets = last.reshape(-1, last.shape[-1]), targets.reshape(-1)
    if shaping.temperature != 1.0:
        if linear is not None and linear.bias is not None:
            last, linear = linear(last), None
        last = last / shaping.temperature  # of the hidden states, too: the head is linear
        shaping = replace(shaping, temperature=1.0)
    if linear is not None and not linear.weight.requires_grad:
        loss, correct, *more = _LinearCrossEntropy.apply(last, linear.weight, linear.bias, targets, shaping)
    else:
        logits = last if linear is None else cpu_products.linear(linear, last)
        loss, correct, *more = _CrossEntropy.apply(logits, targets, shaping)
    nll, extra = more or (loss, torch.zeros_like(loss))
    return TokenLosses(nll, correct, loss, extra)


def trained_logits(
    model: Any, inputs: dict[str, Tensor], labels: Tensor, trained_at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the trained positions, or of more positions if the model cannot select them.

    If the LM head is bypassed, the model returns hidden states (…, h) instead of logits (…, V).
    """
    trained = labels != IGNORED  # (B, T)
    match _choice_offered(model):
        case "mask" | "positions" if trained_at is not None:
            logits = model(**inputs, use_cache=False, logits_to_keep=trained_at).logits
            return logits, labels[:, trained_at]  # (1, positions, V)
        case "mask":
            logits = model(**inputs, use_cache=False, logits_to_keep=trained).logits
            return logits, labels[trained]  # (positions, V)
        case "positions":
            kept = trained.any(0).nonzero()[:, 0]  # trained in any row
            logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
            return logits, labels[:, kept]  # (B, kept, V)
        case "all":
            logits = model(**inputs, use_cache=False).logits
            return logits[:, -labels.shape[1] :], labels  # (B, T, V): prompt tuning prepends virtual tokens


def _choice_offered(model: Any) -> Literal["mask", "positions", "all"]:
    """What ``logits_to_keep`` of a model accepts: a mask (transformers 5), column positions, or nothing ("all")."""
    base = base_model.of(model)
    if base_model.has_virtual_tokens(model) or "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        return "all"
    home = sys.modules[type(base).forward.__module__]  # not the class's module: fully_shard creates a new class
    return "mask" if hasattr(home, "slice_logits_to_keep") else "positions"


class _CrossEntropy(torch.autograd.Function):
    """The losses of each row (n,); the gradient overwrites the logits (n, V) in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shaping: Shaping) -> tuple[Tensor, ...]:
        buffer = logits.detach()  # same version counter: autograd raises if another operation needs the logits
        loss, *more = logit_losses.cross_entropy_(buffer, targets, shaping, needs_grad=ctx.needs_input_grad[0])
        ctx.grad = buffer
        ctx.mark_non_differentiable(*more)
        return loss, *more

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        grad, ctx.grad = ctx.grad, None  # freed: a second backward pass would scale it twice
        return _scaled_(grad, scale), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses of each row from hidden states (n, h) and the frozen weight of the LM head (V, h).

    Computes the gradient of a chunk together with its logits, as in Liger Kernel, section 3.2 of
    https://arxiv.org/abs/2410.10989.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping
    ) -> tuple[Tensor, ...]:
        device, needs_grad = hidden.device, ctx.needs_input_grad[0]
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        ctx.grad = torch.empty_like(hidden) if needs_grad else hidden
        chunks = max(1, -(-len(hidden) // (CPU_HEAD_POSITIONS if device.type == "cpu" else HEAD_POSITIONS)))
        losses = []
        with torch.autocast(device.type, enabled=False):
            weight, bias = weight.to(dtype), bias.to(dtype) if bias is not None else None
            chunked = (tensor.chunk(chunks) for tensor in (hidden, targets, ctx.grad))
            for states, labels, grad in zip(*chunked, strict=True):
                logits = cpu_products.product(states.to(dtype), weight)
                logits = logits if bias is None else logits.add_(bias)
                losses.append(logit_losses.cross_entropy_(logits, labels, shaping, needs_grad=needs_grad))
                shaping = shaping.after(labels)
                if needs_grad:
                    grad.copy_(cpu_products.product(logits, weight.t()))  # `logits` contains its gradient by now
        loss, *more = (torch.cat(parts) for parts in zip(*losses, strict=True))
        ctx.mark_non_differentiable(*more)
        return loss, *more

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, ctx.grad = ctx.grad, None
        return _scaled_(grad, scale), None, None, None, None


def _scaled_(grad: Tensor, scale: Tensor) -> Tensor:
    """Multiply each row of ``grad`` (n, d) by its ``scale`` (n,), in place."""
    if len(scale) and scale.stride(0) == 0:  # expanded by the backward pass of a sum: one number for all rows
        return grad.mul_(scale[0])
    return grad.mul_(scale[:, None])
