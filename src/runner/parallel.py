"""How one model is spread over processes: for now, not at all."""

from __future__ import annotations


def none() -> None:
    """One process on one device."""
