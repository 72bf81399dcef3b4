"""Names of runs, from their overrides. Imports nothing heavy: every verb reads names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.secrets import redact


def label(manifest: Mapping[str, Any], folder: Path) -> str:
    """The name of a run in tables: its label in the sweep, else its own name, else the name of its folder."""
    return str(manifest.get("label") or manifest.get("name") or folder.name)


def short_name(manifest: Mapping[str, Any]) -> str:
    """The name of a run in MLflow, whose columns are narrow: ``tiny,max_steps=40`` for a run without a name of its own.

    Without beginnings of keys, folders, and names of groups, except in a sweep, where ``quant=none`` is not ``none``.
    """
    overrides, name = [str(word) for word in manifest.get("overrides") or []], str(manifest.get("name") or "")
    if name != default_name(overrides) or not overrides:
        return name
    groups, parts = {} if manifest.get("label") else manifest.get("choices") or {}, []
    for key, _, value in (word.partition("=") for word in _naming(overrides)):
        value = re.sub(r"[^\s=,:\[\]{}]*/", "", value)
        parts.append(value if key in groups else f"{key.rpartition('.')[2].lstrip('+')}={value}")
    return _cut(parts) or name


def default_name(overrides: Sequence[str]) -> str:
    """The name of a run that the user did not name: its overrides."""
    return _cut(_naming(overrides)) or "defaults"


def _cut(words: Sequence[str]) -> str:
    """The first 120 characters of the words, without secrets."""
    return redact(",".join(words))[:120].rstrip(",")


def _naming(overrides: Sequence[str]) -> list[str]:
    """The overrides that belong into a name."""
    return [
        word for word in overrides
        if not word.startswith(("hydra.", "outputs_dir=", "tracking", "resume=", "train.sample"))
    ]  # fmt: skip
