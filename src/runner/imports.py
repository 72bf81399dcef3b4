"""Python's garbage collector while libraries are imported that take seconds, and while many objects are created."""

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


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Run Python's cyclic garbage collector after 50,000 new objects, not after 700.

    The nodes of a configuration refer to each other, some thousand in each job: the collector takes a fifth of the time
    in which a sweep is composed, and a tenth when it runs seldom, for 10 MiB of memory.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(before[0], 50_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
