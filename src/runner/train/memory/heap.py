"""Tune glibc's malloc against heap fragmentation, so that a freed tensor's block fits the next tensor of that size.

PyTorch allocates aligned memory. glibc allocates a little more and puts the cut-off ends into its caches of small
blocks (tcache and fast bins). Cached ends are not merged with their neighbours, so a freed block is some bytes too
small for a tensor of the same size, and holes stay between the saved activations. In a training step of SmolLM2 the
holes were 0.55 of the activations; without these caches, and with large tensors aligned to huge pages
(THP_MEM_ALLOC_ENABLE), they are 0.05. glibc reads these settings only when a process starts.
"""

from __future__ import annotations

import contextlib
import os
import sys

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}


def is_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):  # not Linux, or another C library
        return False


def tunables() -> str:
    """The value of ``VARIABLE`` for a training process: its current value plus those ``TUNABLES`` it does not set."""
    current = os.environ.get(VARIABLE, "")
    missing = [f"{name}={value}" for name, value in TUNABLES.items() if f"{name}=" not in current]
    return ":".join(filter(None, [current, *missing]))


def restart() -> None:
    """Re-execute this program (same pid) with ``TUNABLES`` set; no-op if they are set or glibc is not used.

    Call it first in a program, because everything before is executed again. Takes 20 ms.
    """
    if not is_glibc() or os.environ.get(VARIABLE) == tunables() or "torch" in sys.modules:
        return
    os.environ[VARIABLE] = tunables()
    with contextlib.suppress(OSError):  # without it, training needs more memory
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
