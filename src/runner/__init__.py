"""Fine-tuning experiments that compose, launch, track and compare themselves."""

from pathlib import Path

PACKAGE = Path(__file__).parent
"""The folder of this package; in a checkout conf/ and uv.lock are two levels above it."""
