"""Choose the dtype of weights and computation: which dtypes this hardware computes fast, and which are not allowed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from runner.errors import Fault
from runner.models.kernels import compat, processor

if TYPE_CHECKING:
    import torch


Precision = Literal["auto", "float32", "bfloat16", "float16"]

log = logging.getLogger(__name__)


def dtype_for(name: Precision, device: torch.device | str) -> torch.dtype:
    """The torch dtype of ``name`` on ``device``; ``auto``: bfloat16 if the hardware computes it fast, else float32.

    A CPU counts as fast only with AMX. One LoRA step of SmolLM2-135M took 130 s in bfloat16 but 4.5 s in float32 on a
    CPU with neither AMX nor AVX512-BF16. With AVX512-BF16 only, bfloat16 is 1.6 times as fast as float32 but less
    precise, so the user decides: see ``faster_dtype``.
    """
    import torch

    device = torch.device(device)
    fast = _is_fast_in_bfloat16(device)
    if name == "auto":
        return torch.bfloat16 if fast else torch.float32
    computes = device.type != "cpu" or not torch.cuda.is_available()  # else: FSDP loads on the CPU, for GPUs
    has_some = device.type == "cpu" and "avx512_bf16" in processor.flags()
    if name == "bfloat16" and computes and not fast and not has_some:
        log.warning(
            "dtype=bfloat16: this %s has no bfloat16 instructions; expect steps 30 to 60 times slower than in float32. "
            "Use dtype=auto.",
            device.type,
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def faster_dtype(used: torch.dtype, device: torch.device) -> str | None:
    """A dtype in which this CPU is faster than in ``used``; None if there is none."""
    import torch

    if device.type == "cpu" and used == torch.float32 and "avx512_bf16" in processor.flags():
        return "bfloat16"
    return None


def slow_gpu(used: torch.dtype, device: torch.device) -> str:
    """What ``plan`` says about a GPU that computes float32 because it has no bfloat16; else empty.

    Its float16 is much faster, but is not allowed: ``dtype_faults``.
    """
    import torch

    if device.type != "cuda" or used != torch.float32 or _is_fast_in_bfloat16(device):
        return ""
    return " of float32: this GPU has no bfloat16, and one of the generation of A100 or later is many times as fast"


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype as keyword argument of ``from_pretrained`` and ``from_config``."""
    return {compat.dtype_keyword(): dtype}


def dtype_faults(key: str, name: Precision) -> Iterator[Fault]:
    """float16 is not allowed: its gradients underflow without a loss scaler, which this train loop does not have."""
    if name == "float16":
        problem = (
            "not supported: float16 gradients underflow without a loss scaler, which this train loop does not have"
        )
        yield Fault(key, problem, f"use {key}=bfloat16 (same size, range of float32), or auto", name)


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs emulate it
    return device.type == "cpu" and "amx_bf16" in processor.flags()
