"""Matrix products in float32 on AMD's processors with AVX-512: by oneDNN, twice as fast as by MKL.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 only on Intel's processors. oneDNN, a part of PyTorch
too, uses it on all of them. It compiles code for each shape (1 to 2 ms, about 2 MB) and caches the code of the last
1024, in two caches. The batches of a run have many shapes, so this could fill 2 GB: ``runner`` limits the caches when
it is imported before PyTorch. Where they are not limited, MKL multiplies.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runner import ONEDNN_CACHES
from runner.models.kernels import lm_head, processor

FEWEST = 2**24
"""Multiplications from which oneDNN computes a product: smaller ones do not pay for the compilation."""
MOST_CACHED = 64
"""The largest limit of the caches with which oneDNN is used."""


def install(model: nn.Module) -> int:
    """Let ``linear`` compute the model's plain linear layers, but for the LM head, if oneDNN is used here.

    Those are the layers without an adapter: all in full fine-tuning, and below adapters that PEFT computes. Returns
    their number.
    """
    if not is_used():
        return 0
    head = lm_head.of(model)
    layers: list[Any] = [each for each in model.modules() if type(each) is nn.Linear and each is not head]
    layers = [each for each in layers if "forward" not in vars(each) and type(each.weight) is nn.Parameter]
    for layer in layers:
        layer.forward = functools.partial(linear, layer)
    return len(layers)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The output (…, N) of a linear layer, differentiable."""
    rows, weight = x.reshape(-1, x.shape[-1]), layer.weight
    if not _suits(rows, weight) or torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, weight, layer.bias)
    out: Tensor = _Linear.apply(rows, weight)
    out = out if layer.bias is None else out + layer.bias
    return out.reshape(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """x (n, K) times weightᵀ (K, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else product(grad.t(), x.t())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, K) times weightᵀ (K, N) → (n, N). oneDNN's has no gradient: call it inside of autograd functions."""
    return _by_onednn(x, weight) if _suits(x, weight) else x @ weight.t()


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product: it is large, in float32, on a CPU and neither compiled nor simulated."""
    count = x.shape[0] * weight.shape[0] * weight.shape[1]
    if count < FEWEST or {type(x), type(weight)} - {Tensor, nn.Parameter} or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and is_used()


@functools.cache
def is_used() -> bool:
    """Whether oneDNN computes large products in this process."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return processor.is_amd() and "avx512f" in processor.flags() and are_limited(os.environ) and _is_right()


def library() -> str:
    """What computes large float32 products in this process: their last digits depend on it."""
    return "oneDNN" if is_used() else "MKL"


def are_limited(environment: Mapping[str, str]) -> bool:
    """Whether both caches of compiled products are limited."""
    limits = [environment.get(name, "") for name in ONEDNN_CACHES]
    return all(limit.isdecimal() and 0 < int(limit) <= MOST_CACHED for limit in limits)


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # Inductor's operator
    return out


def _is_right() -> bool:
    """Whether this PyTorch has the operator, and it multiplies weights in either order of their elements."""
    x, weight = torch.arange(15.0).reshape(3, 5), torch.arange(20.0).reshape(4, 5)
    try:
        found = [_by_onednn(x, weight), _by_onednn(x, weight.t().contiguous().t())]
    except (AttributeError, RuntimeError):
        return False
    return all(torch.allclose(each, x @ weight.t()) for each in found)
