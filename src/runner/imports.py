"""Import libraries that take seconds."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator

MANY = 100
"""From so many new modules on, what they have created is left out of all later collections."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause Python's cyclic garbage collector while the block imports libraries.

    They create a million objects that stay; the collector visits all of them again and again, for an eighth of the
    time that torch, transformers and PEFT take. Afterwards it never visits them: in a forked process, that would also
    copy their memory.
    """
    was_enabled, count = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - count >= MANY:
            gc.freeze()
            atexit.register(gc.unfreeze)  # what is still there when Python ends, Triton's bindings call leaked
        if was_enabled:
            gc.enable()
