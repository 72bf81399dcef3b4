"""Matrix products of a linear layer with LoRA, with their gradients: fewer passes over activations than term by term.

``MergedProduct`` and ``InPlaceProduct`` compute a layer alone. Layers with the same input (q, k and v of attention,
gate and up of an MLP) share what depends on the input alone: ``Reduction`` multiplies it by the matrices A of all of
them, ``AddedProduct`` is the rest of each layer. The gradient of the input is one tensor that each of them adds to in
place: in the backward pass it goes from the last layer to the first, and then to the reduction.

Where all A are frozen (LoRA-FA), ``x Aᵀ`` is kept for the backward pass, and not x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runner.models.kernels import buffers
from runner.models.kernels.cpu_products import product

if TYPE_CHECKING:
    from runner.models.quantization.quant import Quant

MANY_ROWS = 128
"""With at least this many rows, merging the weight costs less than a pass over the output."""


def _dense(weight: Tensor, quant: Quant | None, state: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight (N, K); unpacked if it is quantized."""
    return weight if quant is None else quant.unpack(weight, state, dtype)


torch.library.define("runner::add_product_", "(Tensor(a!) out, Tensor first, Tensor second, float beta) -> ()")


@torch.library.impl("runner::add_product_", "CompositeExplicitAutograd")
def _add_product(out: Tensor, first: Tensor, second: Tensor, beta: float) -> None:
    out.addmm_(first, second, beta=beta)


def _plus_product(out: Tensor, first: Tensor, second: Tensor, beta: float = 1.0) -> Tensor:
    """beta · out + first · second, written to ``out`` (n, m), which nothing else may use.

    An operator of its own when compiled: Inductor makes ``addmm_`` an addition to a copy of ``out``.
    """
    if not torch.compiler.is_compiling():
        return out.addmm_(first, second, beta=beta)
    torch.ops.runner.add_product_(out, first, second, beta)
    return out


class MergedProduct(torch.autograd.Function):
    """x (n, K) times (W + scale · B A)ᵀ (K, N)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quant: Quant | None, state: Any, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else x @ a.t(), weight, a, b)
        ctx.quant, ctx.state, ctx.scale = quant, state, scale
        merged = buffers.take("weight", (len(b), a.shape[1]), x)
        return product(x, _unpack_into(merged, weight, quant, state).addmm_(b, a, alpha=scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors  # x: its product with Aᵀ, if A is frozen
        inputs, rank = a.shape[1], a.shape[0]
        dx = None
        if ctx.needs_input_grad[0]:
            wide = buffers.take("weight", (len(b), inputs + rank), grad)  # [W + scale · B A, scale · B]
            _unpack_into(wide[:, :inputs], weight, ctx.quant, ctx.state).addmm_(b, a, alpha=ctx.scale)
            wide[:, inputs:] = b * ctx.scale
            dx, reduced = product(grad, wide.t()).split([inputs, rank], 1)  # (n, K), (n, r)
        else:
            reduced = (grad @ b).mul_(ctx.scale)
        trains_a = ctx.needs_input_grad[4]
        db = narrow_product(x @ a.t() if trains_a else x, grad).mul_(ctx.scale).t()
        return dx, None, None, None, narrow_product(reduced, x) if trains_a else None, db, None


def _unpack_into(out: Tensor, weight: Tensor, quant: Quant | None, state: Any) -> Tensor:
    """Write the dense weight (N, K) to ``out``."""
    return out.copy_(weight) if quant is None else quant.unpack(weight, state, out.dtype, out)


def narrow_product(narrow: Tensor, wide: Tensor) -> Tensor:
    """narrowᵀ (r, n) times wide (n, K); split into parts on a CPU, whose BLAS uses one core for a single product."""
    parts = 1
    if wide.device.type == "cpu" and not torch.compiler.is_compiling():
        parts = min(torch.get_num_threads(), len(wide) // MANY_ROWS)
    if parts < 2:
        return narrow.t() @ wide
    size = len(wide) // parts
    first, second = (rows[: parts * size].reshape(parts, size, -1) for rows in (narrow, wide))
    rest, wide_rest = (rows[parts * size :] for rows in (narrow, wide))
    return torch.bmm(first.transpose(1, 2), second).sum(0).addmm_(rest.t(), wide_rest)


class InPlaceProduct(torch.autograd.Function):
    """scale · (x Aᵀ) Bᵀ with x (n, K) times Wᵀ (K, N) added in place; A and B are cast to the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quant: Quant | None, state: Any, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        reduced = x @ low_a.t()  # (n, r)
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, weight, low_a, low_b, reduced)
        ctx.quant, ctx.state, ctx.scale, ctx.dtype = quant, state, scale, a.dtype
        return _plus_product(reduced @ low_b.t(), x, _dense(weight, quant, state, x.dtype).t(), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, Tensor, None]:
        x, weight, a, b, reduced = ctx.saved_tensors
        slope = (grad @ b).mul_(ctx.scale)  # (n, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _plus_product(grad @ _dense(weight, ctx.quant, ctx.state, grad.dtype), slope, a)
        da = None if x is None else (slope.t() @ x).to(ctx.dtype)
        db = (grad.t() @ reduced).mul_(ctx.scale).to(ctx.dtype)
        return dx, None, None, None, da, db, None


class Reduction(torch.autograd.Function):
    """x (n, K) → x (A₁; A₂; …)ᵀ (n, r₁ + r₂ + …) of several layers, and x for the first of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *adapters: Tensor) -> tuple[Tensor, Tensor]:
        stacked = torch.cat(adapters).to(x.dtype)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, stacked)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.ranks = adapters[0].dtype, [len(a) for a in adapters]
        return x @ stacked.t(), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        """``slope``: (n, r₁ + r₂ + …); ``dx``: (n, K), the gradient through the weights of the layers."""
        x, stacked = ctx.saved_tensors
        if slope is None:
            return dx, *[None] * len(ctx.ranks)
        if ctx.needs_input_grad[0]:
            dx = slope @ stacked if dx is None else _plus_product(dx, slope, stacked)
        if not any(ctx.needs_input_grad[1:]):
            return dx, *[None] * len(ctx.ranks)
        return dx, *(slope.t() @ x).to(ctx.dtype).split(ctx.ranks)


class AddedProduct(torch.autograd.Function):
    """scale · reduced (n, r) Bᵀ + x (n, K) Wᵀ, and x for the next layer; ``reduced`` is this layer's part of x Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, reduced: Tensor, weight: Tensor, quant: Quant | None, state: Any, b: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        low_b = b.to(x.dtype)
        ctx.save_for_backward(reduced, weight, low_b)
        ctx.set_materialize_grads(False)
        ctx.quant, ctx.state, ctx.scale, ctx.dtype = quant, state, scale, b.dtype
        out = _plus_product(reduced @ low_b.t(), x, _dense(weight, quant, state, x.dtype).t(), scale)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        """``dx``: (n, K), the gradient through the weights of the layers after this one; nothing else uses it."""
        if grad is None:
            return dx, *[None] * 6
        reduced, weight, b = ctx.saved_tensors
        slope = (grad @ b).mul_(ctx.scale)  # (n, r)
        if ctx.needs_input_grad[0]:
            dense = _dense(weight, ctx.quant, ctx.state, grad.dtype)
            dx = grad @ dense if dx is None else _plus_product(dx, grad, dense)
        db = (grad.t() @ reduced).mul_(ctx.scale)
        return dx, slope, None, None, None, db.to(ctx.dtype), None
