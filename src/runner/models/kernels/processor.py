"""What the processor of this machine is: its vendor and its instruction sets."""

from __future__ import annotations

import functools
import os
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables of oneDNN: the newest instruction set that it may use."""


def flags() -> frozenset[str]:
    """The instruction sets that oneDNN uses on this CPU, by Linux's names; empty if there is no /proc/cpuinfo.

    For example, ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI`` disables AMX and AVX512-BF16 (oneDNN's documentation, "CPU
    dispatcher control"), which makes bfloat16 slow.
    """
    limit = next((os.environ[name].upper() for name in ISA_LIMITS if os.environ.get(name)), "")
    unused = set()
    if limit and "AMX" not in limit and limit not in ("DEFAULT", "ALL"):
        unused |= {flag for flag in _words("flags") if flag.startswith("amx")}
        if not limit.endswith(("BF16", "FP16")) and not limit.startswith("AVX10"):
            unused |= {"avx512_bf16"}
    return _words("flags") - unused


def is_amd() -> bool:
    """Whether this is a processor of AMD."""
    return "AuthenticAMD" in _words("vendor_id")


@functools.cache
def _words(key: str) -> frozenset[str]:
    """The words after ``key`` in ``CPU_INFO``; empty if there is none."""
    if not CPU_INFO.exists():
        return frozenset()
    lines = CPU_INFO.read_text().splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith(key)), []))
