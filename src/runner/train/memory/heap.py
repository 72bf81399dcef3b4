"""glibc's heap, set so that what one tensor leaves fits the next one of its size.

PyTorch asks for aligned memory. glibc takes a little more and puts the ends that it cut off into its caches of small
blocks (tcache and fast bins), where they no longer join what lies beside them: a freed block is then some bytes too
small for its like, and between all that is kept for the backward pass holes stay. In a step of SmolLM2 they were 0.55
of what was kept; without these caches, and with large tensors at the bounds of huge pages (see ``__init__``), they are
0.05. But glibc reads the size of the first cache before a process starts.
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
    except (AttributeError, ValueError, OSError):  # another system, or another C library
        return False


def tunables() -> str:
    """The value of ``VARIABLE`` for a process that trains: what is in it already, and ours where nothing is said."""
    said = os.environ.get(VARIABLE, "")
    missing = [f"{name}={value}" for name, value in TUNABLES.items() if f"{name}=" not in said]
    return ":".join(filter(None, [said, *missing]))


def restart() -> None:
    """Begin this program anew with the heap set, as the same process; does nothing where that is so or has no effect.

    For the beginning of a program: all that was done is done again. It takes 20 ms.
    """
    if not is_glibc() or os.environ.get(VARIABLE) == tunables() or "torch" in sys.modules:
        return
    os.environ[VARIABLE] = tunables()
    with contextlib.suppress(OSError):  # where it cannot, it needs more memory
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
