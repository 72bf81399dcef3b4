"""Faster LoRA layers: same results as PEFT with fewer passes over activations.

PEFT computes ``x Wᵀ + scale · (x Aᵀ) Bᵀ`` term by term: several passes over tensors of the size of the output, and,
with float32 adapters on a bfloat16 base, a float32 copy of every input. Instead:

- In float32 with many rows: one product with the merged weight ``W + scale · B A``, which is only as large as the
  weight and is computed again in the backward pass. The same product gives the gradient of the input.
- Otherwise: the low-rank term is added in place, in the dtype of the input; only the optimizer uses float32 adapters.
  (In bfloat16 a small ``B A`` would be lost in the sum with ``W``.) Layers with the same input are ``Siblings``.

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

from runner.models.kernels import compat
from runner.models.kernels.lora_products import MANY_ROWS, AddedProduct, InPlaceProduct, MergedProduct, Reduction

if TYPE_CHECKING:
    from runner.models.quantization.quant import Quant

SIBLINGS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Names of layers of one module that get the same input."""
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
        module.siblings = None  # type: ignore[assignment]
    for module in model.modules():
        for names in SIBLINGS:
            members = [each for each in (getattr(module, name, None) for name in names) if isinstance(each, _Fused)]
            if len(members) > 1:
                _Siblings(members)
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
        siblings = layer.siblings if rows.dtype != torch.float32 else None
        if siblings is not None and siblings.share(name):
            out = siblings.product(layer, name, x, rows, state)
        else:
            product = MergedProduct if merge else InPlaceProduct
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


class _Siblings:
    """LoRA layers of one module with the same input, in the order in which it calls them.

    The first one that is called multiplies the input by all matrices A, for the others too. Each of them has to be
    called with the same tensor object for that; with another one it begins anew, and the result is the same.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._input: Tensor | None = None
        """The argument of the running forward pass, until all layers were called."""
        self._waiting: dict[int, Tensor] = {}
        """Number of a layer that was not called yet → its part of the reduced input (n, r)."""
        self._passed: Tensor | None = None
        """The input (n, K) as the last layer has passed it on."""
        for layer in layers:
            layer.siblings = self

    def share(self, name: str) -> bool:
        """Whether ``name`` is the only adapter of all layers."""
        return all(_only_adapter(layer) == name for layer in self._layers)

    def product(self, layer: Any, name: str, x: Tensor, rows: Tensor, state: Any) -> Tensor:
        """The output (n, N) of a layer without its bias; ``rows``: ``x`` as (n, K)."""
        number = next(n for n, each in enumerate(self._layers) if each is layer)
        if self._input is not x or number not in self._waiting:
            adapters = [each.lora_A[name].weight for each in self._layers]
            reduced, passed = Reduction.apply(rows, *adapters)
            self._passed = passed if rows.requires_grad else rows  # outputs of a function of A always require gradients
            parts = reduced.split([len(adapter) for adapter in adapters], 1)
            self._input, self._waiting = x, dict(enumerate(parts))
        own, b = self._waiting.pop(number), layer.lora_B[name].weight
        weight, quant = layer.base_layer.weight, layer.quant
        out, passed = AddedProduct.apply(self._passed, own, weight, quant, state, b, layer.scaling[name])
        self._passed = passed if rows.requires_grad else rows
        if not self._waiting or not torch.is_grad_enabled():
            self._input, self._passed, self._waiting = None, None, {}
        return out
