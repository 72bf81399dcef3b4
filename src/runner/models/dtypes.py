"""Number formats of weights and arithmetic: which one this hardware computes fast, and which are refused."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner.errors import Fault

if TYPE_CHECKING:
    import torch


Precision = Literal["auto", "float32", "bfloat16", "float16"]

CPU_INFO = Path("/proc/cpuinfo")
log = logging.getLogger(__name__)


def dtype_for(name: Precision, device: torch.device | str) -> torch.dtype:
    """The dtype ``name`` means on ``device``: ``auto`` is bfloat16 where the hardware is fast in it, else float32.

    A CPU counts as fast with AMX only. One LoRA step of SmolLM2-135M took 130 s in bfloat16 against 4.5 s in float32
    on a CPU with neither AMX nor AVX512-BF16. With AVX512-BF16 alone it is 1.6 times as fast as float32, for whom its
    precision suffices: see ``faster_dtype``.
    """
    import torch

    device = torch.device(device)
    fast = _is_fast_in_bfloat16(device)
    if name == "auto":
        return torch.bfloat16 if fast else torch.float32
    if name == "bfloat16" and not fast and not (device.type == "cpu" and "avx512_bf16" in cpu_flags()):
        log.warning(
            "bfloat16 was asked for, and this %s does not compute in it: expect steps 30 to 60 times slower than in "
            "float32. Use dtype=auto.",
            device.type,
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def faster_dtype(used: torch.dtype, device: torch.device) -> str | None:
    """A dtype that this CPU computes faster in than in the one that is used; None where there is none."""
    import torch

    if device.type == "cpu" and used == torch.float32 and "avx512_bf16" in cpu_flags():
        return "bfloat16"
    return None


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword of ``from_pretrained`` and ``from_config``: transformers 4.56 renamed it."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


def dtype_faults(key: str, name: Precision) -> Iterator[Fault]:
    """float16 underflows without a loss scaler, and there is none here."""
    if name == "float16":
        problem = "cannot be trained: float16 gradients underflow without a loss scaler, and this loop has none"
        yield Fault(key, problem, f"use {key}=bfloat16 (same size, the range of float32), or auto", name)


ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""oneDNN's own variables: it computes with no newer instructions than the one that they name."""


def cpu_flags() -> frozenset[str]:
    """The instruction sets that oneDNN uses on this CPU, in Linux's names; empty where there is no /proc/cpuinfo.

    ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI`` leaves AMX and AVX512-BF16 unused (oneDNN's documentation, "CPU dispatcher
    control"), and bfloat16 is slow then.
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
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones only emulate it
    return device.type == "cpu" and "amx_bf16" in cpu_flags()
