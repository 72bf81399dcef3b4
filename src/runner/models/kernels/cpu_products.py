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

import torch
from torch import Tensor, nn

from runner import ONEDNN_CACHES
from runner.models.kernels import processor

FEWEST = 2**24
"""Multiplications from which oneDNN computes a product: smaller ones do not pay for the compilation."""
MOST_CACHED = 64
"""The largest limit of the caches with which oneDNN is used."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, K) times weightᵀ (K, N) + bias (N,) → (n, N), as ``product``."""
    return product(x, weight) if bias is None else nn.functional.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, K) times weightᵀ (K, N) → (n, N). oneDNN's has no gradient: call it inside of autograd functions."""
    count = x.shape[0] * weight.shape[0] * weight.shape[1]
    if count < FEWEST or type(x) is not Tensor or torch.compiler.is_compiling():
        return x @ weight.t()
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or not is_used():
        return x @ weight.t()
    return _by_onednn(x, weight)


@functools.cache
def is_used() -> bool:
    """Whether oneDNN computes large products in this process."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return processor.is_amd() and "avx512f" in processor.flags() and are_limited(os.environ) and _is_right()


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
