"""Environment variables that are changed for a moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def kept(name: str, value: str | None = None) -> Iterator[None]:
    """After the block, the variable is as before it, whatever the block has done.

    ``value``: its value inside the block; None: as it is.
    """
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
