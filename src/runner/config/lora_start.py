"""``lora.start``: the run whose adapter is trained further, as the user names it, or frozen as ``FOLDER@DIGEST``.

FOLDER is the folder of that run, or of a plain PEFT adapter; DIGEST is the hash of the adapter's weights. Only DIGEST
is part of the signature: the same weights in another place make the same run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUP, KEY = "lora", "start"
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FROZEN = re.compile(r"(.+)@([0-9a-f]{32})", re.DOTALL)


def split(text: str) -> tuple[str, str]:
    """(RUN or FOLDER, DIGEST); the digest is empty in what a user types."""
    match = _FROZEN.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def joined(folder: Path | str, digest: str) -> str:
    return f"{folder}@{digest}"


def of(cfg: Mapping[str, Any]) -> str:
    """The value of ``lora.start``; empty without one."""
    node = cfg.get(GROUP)
    value = node.get(KEY) if isinstance(node, Mapping) else None
    return value if isinstance(value, str) else ""


def adapter_in(folder: Path) -> Path:
    """The folder with the adapter: ``folder`` itself, or ``model/`` of a run folder."""
    return folder if (folder / ADAPTER).is_file() else folder / "model"


def replaced(cfg: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The configuration with another value of ``lora.start``."""
    return {**cfg, GROUP: {**cfg[GROUP], KEY: text}}


def without_place(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the digest alone; without the key if it is null, as before the key existed."""
    node = cfg.get(GROUP)
    if not isinstance(node, Mapping) or KEY not in node:
        return dict(cfg)
    if text := of(cfg):
        folder, digest = split(text)
        return replaced(cfg, digest or folder)
    return {**cfg, GROUP: {key: value for key, value in node.items() if key != KEY or value is not None}}
