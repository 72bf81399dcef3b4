"""Attention by document on a CPU: torch's flash kernel, one document at a time, as an operation of torch's."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("runner::attention_by_document", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, prefixes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention, one document at a time; returns (1, T, H, D) and the log-sum-exp (H, T)."""
    heads, length, width = query.shape[1:]
    out = query.new_zeros(1, length, heads, width)
    normalizer = query.new_zeros((heads, length), dtype=torch.float32)
    groups = key.shape[1], heads // key.shape[1]
    for span, prefix in _spans(ends, prefixes):
        q, k, v = (_document(tensor, span, prefix, groups) for tensor in (query, key, value))
        result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        before = prefix.stop - prefix.start
        out[0, span].unflatten(1, groups).copy_(result[:, :, before:].permute(2, 0, 1, 3))
        normalizer[:, span].unflatten(0, groups).copy_(logsumexp[..., before:])
    return out, normalizer


@torch.library.custom_op("runner::attention_by_document_backward", mutates_args=())
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalizer: Tensor, ends: Tensor,
    scale: float, prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query (1, T, H, D), key and value (1, T, Hkv, D)."""
    heads, kv_heads = query.shape[1], key.shape[1]
    groups = kv_heads, heads // kv_heads
    length, width = query.shape[2:]
    dq, dk, dv = (query.new_zeros(1, length, count, width) for count in (heads, kv_heads, kv_heads))
    grad, out, normalizer = grad.transpose(1, 2), out.transpose(1, 2), normalizer[None, ..., None]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for span, prefix in _spans(ends, prefixes):
        q, k, v, o, g, lse = (
            _document(tensor, span, prefix, groups) for tensor in (query, key, value, out, grad, normalizer)
        )
        before = prefix.stop - prefix.start
        if before:
            g[:, :, :before] = 0  # these outputs are those of the document that has the tokens
        grad_q, grad_k, grad_v = kernel(g, q, k, v, o, lse[..., 0], 0.0, True, scale=scale)  # (Hkv, H / Hkv, t, D)
        dq[0, span].unflatten(1, groups).copy_(grad_q[:, :, before:].permute(2, 0, 1, 3))
        for total, part in ((dk, grad_k), (dv, grad_v)):
            torch.sum(part[:, :, before:].permute(2, 0, 1, 3), 2, out=total[0, span])
            if before:
                total[0, prefix] += part[:, :, :before].permute(2, 0, 1, 3).sum(2)
    return dq, dk, dv


def _spans(ends: Tensor, prefixes: Tensor | None) -> list[tuple[slice, slice]]:
    """The position ranges of the documents, each with that of the shared tokens before it, which may be empty.

    Skips repeated ends, which only pad ``ends`` to a fixed length.
    """
    spans = [slice(start, end) for start, end in itertools.pairwise(ends.tolist())]
    starts = [(0, 0)] * len(spans) if prefixes is None else prefixes.tolist()
    before = [slice(start, start + count) for start, count in starts]
    return [(span, prefix) for span, prefix in zip(spans, before, strict=True) if span.start < span.stop]


def _document(tensor: Tensor, span: slice, prefix: slice, groups: tuple[int, int]) -> Tensor:
    """One document of (1, heads, T, D), with the tokens before it, as (Hkv, H / Hkv, t, D).

    Expands keys and values of a group without a copy; a document with tokens before it is a copy.
    """
    part = tensor[0, :, span]  # (heads, t, D)
    if prefix.start < prefix.stop:
        part = torch.cat([tensor[0, :, prefix], part], 1)
    if len(part) == groups[0]:
        return part[:, None].expand(-1, groups[1], -1, -1)
    return part.unflatten(0, groups)


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, prefixes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _, heads, length, width = query.shape
    return query.new_empty(1, length, heads, width), query.new_empty((heads, length), dtype=torch.float32)


@backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalizer: Tensor, ends: Tensor,
    scale: float, prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (tensor.new_empty(tensor.transpose(1, 2).shape) for tensor in (query, key, value))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ends, ctx.scale, prefixes = inputs
    ctx.save_for_backward(query, key, value, *output, ends, prefixes)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, ends, prefixes = ctx.saved_tensors
    gradients = backward(grad, *tensors, ends, ctx.scale, prefixes)
    return *(tensor.transpose(1, 2) for tensor in gradients), None, None, None


attend.register_autograd(_gradients, setup_context=_keep)
