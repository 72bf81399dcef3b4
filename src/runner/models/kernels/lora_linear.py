"""LoRA inside the matrix product of its base layer: PEFT's layers and numbers, without their passes over activations.

PEFT computes ``x Wᵀ + scale · (x Aᵀ) Bᵀ`` as it is written: several passes over tensors as large as the output, and
with float32 adapters on a bfloat16 base a float32 copy of every input. Here

- in float32, with many rows: one product with ``W + scale · B A``, a sum as small as the weight itself, made anew in
  the backward pass. The same product gives the gradient of the input;
- else: the low-rank part is added in place, in the dtype of the input, and the adapters stay float32 only as what the
  optimizer sees. (In bfloat16 a small ``B A`` would be lost in the sum with ``W``.)

Weights in 4 and 8 bits are unpacked once for all that. A layer stays the PEFT layer that it was, in its names, in what
is saved and in merging; whatever is not plain LoRA (DoRA, dropout, several adapters, …) computes as PEFT does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from runner.models.kernels import buffers

INT8_MAX = 127
"""What the largest weight of a row is stored as in 8 bits."""
MANY_ROWS = 128
"""From so many rows on adding up the weight costs less than a pass over the output."""


def fuse(model: nn.Module) -> int:
    """Let the LoRA layers of a model compute so where they can; returns how many there are. In place."""
    found = [module for module in model.modules() if _is_lora(module)]
    for module in found:
        cls: Any = type(module)
        module.__class__ = _fused(cls)
    return len(found)


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import LoraLayer

    base = getattr(module, "base_layer", None)
    if not isinstance(module, LoraLayer) or isinstance(module, _Fused) or "forward" not in vars(type(module)):
        return False
    weight = getattr(base, "weight", None)
    return type(base) is nn.Linear or hasattr(weight, "quant_state") or hasattr(weight, "SCB")


@functools.cache
def _fused(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (_Fused, cls), {})


class _Fused(nn.Module):
    """Before a LoRA layer of PEFT in the order of its classes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        name = _only_adapter(layer)
        weight = layer.base_layer.weight
        state = _state(layer.base_layer)
        if args or kwargs or name is None or not _computes_as_stored(layer.base_layer, state, x):
            return super().forward(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        adapters = layer.lora_A[name].weight, layer.lora_B[name].weight
        by_sum = rows.dtype == adapters[0].dtype == torch.float32 and len(rows) >= MANY_ROWS
        product = _OfSum if by_sum else _InPlace
        out = product.apply(rows, weight, state, *adapters, layer.scaling[name])
        if layer.base_layer.bias is not None:
            out = out + layer.base_layer.bias
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _only_adapter(layer: Any) -> str | None:
    """The adapter that is active, if it is the only one and plain; else the layer computes as PEFT does."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    dropout = layer.lora_dropout[name]
    drops = layer.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
    if drops or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    return str(name)


def _state(base: Any) -> Any:
    """How the weight of a layer is unpacked: bitsandbytes' state of 4 bits, the scales (N,) of 8; None: it is dense."""
    if hasattr(base.weight, "SCB"):
        return base.weight.SCB if base.weight.SCB is not None else base.state.SCB  # where the first forward puts it
    return getattr(base.weight, "quant_state", None)


def _computes_as_stored(base: Any, state: Any, x: Tensor) -> bool:
    """Whether the layer multiplies in the dtype of its input, without autocast's or bitsandbytes' casts."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    if state is None:
        return type(base) is nn.Linear and base.weight.dtype == x.dtype
    return getattr(base, "compute_dtype", None) in (None, x.dtype)


def _dense(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) to multiply with; unpacked where it is stored in 4 or 8 bits."""
    if state is None:
        return weight
    if isinstance(state, Tensor):
        return weight.to(dtype).mul_(state[:, None] * (1 / INT8_MAX))
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state).to(dtype)


class _OfSum(torch.autograd.Function):
    """x (n, K) times (W + scale · B A)ᵀ (K, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.state, ctx.scale = state, scale
        summed = buffers.take("weight", (len(b), a.shape[1]), x)
        return x @ _unpack_into(summed, weight, state).addmm_(b, a, alpha=scale).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        inputs, rank = a.shape[1], a.shape[0]
        dx = None
        if ctx.needs_input_grad[0]:
            wide = buffers.take("weight", (len(b), inputs + rank), x)  # W + scale · B A and scale · B: one product
            _unpack_into(wide[:, :inputs], weight, ctx.state).addmm_(b, a, alpha=ctx.scale)
            wide[:, inputs:] = b * ctx.scale
            dx, reduced = (grad @ wide).split([inputs, rank], 1)  # (n, K), (n, r)
        else:
            reduced = (grad @ b).mul_(ctx.scale)
        db = _narrow_product(x @ a.t(), grad).mul_(ctx.scale).t()
        return dx, None, None, _narrow_product(reduced, x), db, None


def _unpack_into(out: Tensor, weight: Tensor, state: Any) -> Tensor:
    """The weight (N, K) as ``_dense`` gives it, written to ``out``."""
    if isinstance(state, Tensor):
        return out.copy_(weight).mul_(state[:, None] * (1 / INT8_MAX))
    return out.copy_(_dense(weight, state, out.dtype))


def _narrow_product(narrow: Tensor, wide: Tensor) -> Tensor:
    """narrowᵀ (r, n) times wide (n, K), which a CPU's library computes on one core unless it is given several."""
    parts = 1
    if wide.device.type == "cpu" and not torch.compiler.is_compiling():
        parts = min(torch.get_num_threads(), len(wide) // MANY_ROWS)
    if parts < 2:
        return narrow.t() @ wide
    size = len(wide) // parts
    first, second = (rows[: parts * size].reshape(parts, size, -1) for rows in (narrow, wide))
    left, right = (rows[parts * size :] for rows in (narrow, wide))
    return torch.bmm(first.transpose(1, 2), second).sum(0).addmm_(left.t(), right)


class _InPlace(torch.autograd.Function):
    """scale · (x Aᵀ) Bᵀ, and x (n, K) times Wᵀ (K, N) added to it in place; A and B cast to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        reduced = x @ low_a.t()  # (n, r)
        ctx.save_for_backward(x, weight, low_a, low_b, reduced)
        ctx.state, ctx.scale, ctx.dtype = state, scale, a.dtype
        return (reduced @ low_b.t()).addmm_(x, _dense(weight, state, x.dtype).t(), beta=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, reduced = ctx.saved_tensors
        slope = (grad @ b).mul_(ctx.scale)  # (n, r)
        dx = (grad @ _dense(weight, ctx.state, x.dtype)).addmm_(slope, a) if ctx.needs_input_grad[0] else None
        da, db = slope.t() @ x, (grad.t() @ reduced).mul_(ctx.scale)
        return dx, None, None, da.to(ctx.dtype), db.to(ctx.dtype), None
