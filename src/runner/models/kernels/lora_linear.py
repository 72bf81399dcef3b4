"""Faster LoRA layers: same results as PEFT with fewer passes over activations.

PEFT computes ``x Wᵀ + scale · (x Aᵀ) Bᵀ`` term by term: several passes over tensors of the size of the output, and,
with float32 adapters on a bfloat16 base, a float32 copy of every input. Instead:

- In float32 with many rows: one product with the merged weight ``W + scale · B A``, which is only as large as the
  weight and is computed again in the backward pass. The same product gives the gradient of the input.
- Otherwise: the low-rank term is added in place, in the dtype of the input; only the optimizer uses float32 adapters.
  (In bfloat16 a small ``B A`` would be lost in the sum with ``W``.)

Quantized weights are unpacked only once per pass; without ``Quant.unpacks`` their layers compute as PEFT does. All
remain PEFT layers: names, saving and merging do not change. Layers that are not plain LoRA (DoRA, dropout, several
adapters, …) compute as PEFT does too.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runner.models.kernels import buffers, compat

if TYPE_CHECKING:
    from runner.models.quantization.quant import Quant

MANY_ROWS = 128
"""With at least this many rows, merging the weight costs less than a pass over the output."""
log = logging.getLogger(__name__)


def fuse(model: nn.Module) -> int:
    """Replace the forward of the model's LoRA layers, in place; returns the number of layers.

    Of a model without weights: the layers that would be replaced if it had them.
    """
    quant: Quant | None = getattr(model, "quant", None)
    head = _empty_head(model)
    layers = [module for module in model.modules() if _is_plain(module) and _is_dense(module.base_layer, quant, head)]
    for module in layers:
        base: Any = module.base_layer
        module.quant = quant if quant is not None and quant.holds(base) else None  # type: ignore[assignment]
        cls: Any = type(module)
        module.__class__ = _fused(cls)
    if quant is not None and not quant.plain and not quant.unpacks:
        log.debug(f"LoRA layers on weights in {quant.name} are not fused: its back end does not unpack weights")
    return len(layers)


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer computes ``base(x) + scale · (x Aᵀ) Bᵀ`` with linear A and B and is not fused yet.

    All LoRA layers of PEFT do that, whatever class they have for a quantization library, except those of convolutions,
    embeddings and whole attention layers. A variant (DoRA) is known only when the layer runs: ``_only_adapter``.
    """
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(module, LoraLayer) or isinstance(module, _Fused):
        return False
    parts = [*module.lora_A.values(), *module.lora_B.values()]
    return bool(parts) and all(type(part) is nn.Linear for part in parts)


def _is_dense(base: Any, quant: Quant | None, head: set[nn.Module]) -> bool:
    """Whether the dense weight of a layer can be used: it is stored as such, or its back end unpacks it."""
    if quant is not None and quant.quantizes(base) and base not in head:
        return quant.unpacks
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter


def _empty_head(model: Any) -> set[nn.Module]:
    """The parts of an LM head without weights: never quantized, but for ``Quant.selects`` a linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts = set(head.modules()) if head is not None else set()
    return {part for part in parts if all(weight.is_meta for weight in part.parameters())}


@functools.cache
def _fused(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (_Fused, cls), {})


class _Fused(nn.Module):
    """Mixin placed before PEFT's LoRA class in the method resolution order."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        name = _only_adapter(layer)
        weight, quant = layer.base_layer.weight, layer.quant
        if args or kwargs or name is None or not _computes_as_stored(layer.base_layer, quant, x):
            return super().forward(x, *args, **kwargs)
        state = quant.state(layer.base_layer) if quant is not None else None
        rows = x.reshape(-1, x.shape[-1])
        adapters = layer.lora_A[name].weight, layer.lora_B[name].weight
        merge = rows.dtype == adapters[0].dtype == torch.float32 and len(rows) >= MANY_ROWS
        product = _MergedProduct if merge else _InPlaceProduct
        out = product.apply(rows, weight, quant, state, *adapters, layer.scaling[name])
        if layer.base_layer.bias is not None:
            out = out + layer.base_layer.bias
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _only_adapter(layer: Any) -> str | None:
    """The name of the active adapter if it is the only one and plain LoRA; else None (PEFT's forward is used)."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    name = names[0]
    dropout = layer.lora_dropout[name]
    drops = layer.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
    if drops or name in compat.lora_variants(layer) or layer.lora_B[name].bias is not None:
        return None
    return str(name)


def _computes_as_stored(base: Any, quant: Quant | None, x: Tensor) -> bool:
    """Whether the layer computes in the dtype of its input, without casts by autocast or the quantization library."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    if quant is None:
        return type(base) is nn.Linear and base.weight.dtype == x.dtype
    return getattr(base, "compute_dtype", None) in (None, x.dtype)


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


class _MergedProduct(torch.autograd.Function):
    """x (n, K) times (W + scale · B A)ᵀ (K, N)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quant: Quant | None, state: Any, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.quant, ctx.state, ctx.scale = quant, state, scale
        merged = buffers.take("weight", (len(b), a.shape[1]), x)
        return x @ _unpack_into(merged, weight, quant, state).addmm_(b, a, alpha=scale).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        inputs, rank = a.shape[1], a.shape[0]
        dx = None
        if ctx.needs_input_grad[0]:
            wide = buffers.take("weight", (len(b), inputs + rank), x)  # [W + scale · B A, scale · B]: a single product
            _unpack_into(wide[:, :inputs], weight, ctx.quant, ctx.state).addmm_(b, a, alpha=ctx.scale)
            wide[:, inputs:] = b * ctx.scale
            dx, reduced = (grad @ wide).split([inputs, rank], 1)  # (n, K), (n, r)
        else:
            reduced = (grad @ b).mul_(ctx.scale)
        db = _narrow_product(x @ a.t(), grad).mul_(ctx.scale).t()
        return dx, None, None, None, _narrow_product(reduced, x), db, None


def _unpack_into(out: Tensor, weight: Tensor, quant: Quant | None, state: Any) -> Tensor:
    """Write the dense weight (N, K) to ``out``."""
    return out.copy_(weight) if quant is None else quant.unpack(weight, state, out.dtype, out)


def _narrow_product(narrow: Tensor, wide: Tensor) -> Tensor:
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


class _InPlaceProduct(torch.autograd.Function):
    """scale · (x Aᵀ) Bᵀ with x (n, K) times Wᵀ (K, N) added in place; A and B are cast to the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quant: Quant | None, state: Any, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        reduced = x @ low_a.t()  # (n, r)
        ctx.save_for_backward(x, weight, low_a, low_b, reduced)
        ctx.quant, ctx.state, ctx.scale, ctx.dtype = quant, state, scale, a.dtype
        return _plus_product(reduced @ low_b.t(), x, _dense(weight, quant, state, x.dtype).t(), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, reduced = ctx.saved_tensors
        slope = (grad @ b).mul_(ctx.scale)  # (n, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _plus_product(grad @ _dense(weight, ctx.quant, ctx.state, x.dtype), slope, a)
        da, db = slope.t() @ x, (grad.t() @ reduced).mul_(ctx.scale)
        return dx, None, None, None, da.to(ctx.dtype), db.to(ctx.dtype), None
