"""Choose the dtype of weights and computation: which dtypes this hardware computes fast, and which are not allowed."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner.errors import Fault
from runner.models.kernels import compat

if TYPE_CHECKING:
    import torch


Precision = Literal["auto", "float32", "bfloat16", "float16"]

CPU_INFO = Path("/proc/cpuinfo")
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
    if name == "bfloat16" and computes and not fast and not (device.type == "cpu" and "avx512_bf16" in cpu_flags()):
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

    if device.type == "cpu" and used == torch.float32 and "avx512_bf16" in cpu_flags():
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


ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables of oneDNN: the newest instruction set that it may use."""


def cpu_flags() -> frozenset[str]:
    """The instruction sets that oneDNN uses on this CPU, by Linux's names; empty if there is no /proc/cpuinfo.

    For example, ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI`` disables AMX and AVX512-BF16 (oneDNN's documentation, "CPU
    dispatcher control"), which makes bfloat16 slow.
    """
    limit = next((os.environ[name].upper() for name in ISA_LIMITS if os.environ.get(name)), "")
    unused = set()
    if limit and "AMX" not in limit and limit not in ("DEFAULT", "ALL"):
        unused |= {flag for flag in _cpu_flags() if flag.startswith("amx")}
        if not limit.endswith(("BF16", "FP16")) and not limit.startswith("AVX10"):
            unused |= {"avx512_bf16"}
    return _cpu_flags() - unused


@functools.cache
def _cpu_flags() -> frozenset[str]:
    if not CPU_INFO.exists():
        return frozenset()
    lines = CPU_INFO.read_text().splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs emulate it
    return device.type == "cpu" and "amx_bf16" in cpu_flags()
