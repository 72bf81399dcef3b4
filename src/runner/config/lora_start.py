"""``lora.start`` and ``task.teacher``: another run or model, as the user names it, or frozen as ``FOLDER@DIGEST``.

FOLDER is the folder of that run, of a plain PEFT adapter (``lora.start``), or of a model or a GGUF file (the teacher);
DIGEST is the hash of its weights. Only DIGEST is part of the signature: the same weights in another place make the same
run. A teacher on the Hub stays as it is named: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUP, KEY = START = "lora", "start"
TEACHER = "task", "teacher"
NAMES = tuple(map(".".join, (START, TEACHER)))
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FROZEN = re.compile(r"(.+)@([0-9a-f]{32})", re.DOTALL)


def split(text: str) -> tuple[str, str]:
    """(RUN or FOLDER, DIGEST); the digest is empty in what a user types."""
    match = _FROZEN.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def joined(folder: Path | str, digest: str) -> str:
    return f"{folder}@{digest}"


def of(cfg: Mapping[str, Any], place: tuple[str, str] = START) -> str:
    """The value of ``lora.start`` (or of the teacher, but not of a task of the user's own); empty without one."""
    node = cfg.get(place[0])
    if not isinstance(node, Mapping) or (place == TEACHER and not str(node.get("_target_")).startswith("runner.")):
        return ""
    value = node.get(place[1])
    return value if isinstance(value, str) else ""


def adapter_in(folder: Path) -> Path:
    """The folder with the adapter: ``folder`` itself, or ``model/`` of a run folder."""
    return folder if (folder / ADAPTER).is_file() else folder / "model"


def replaced(cfg: Mapping[str, Any], text: str, place: tuple[str, str] = START) -> dict[str, Any]:
    """The configuration with another value of ``lora.start`` (or of the teacher)."""
    return {**cfg, place[0]: {**cfg[place[0]], place[1]: text}}


def without_place(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the digests alone; without a key that is null, as before the key existed."""
    cfg = dict(cfg)
    for group, key in (START, TEACHER):
        node = cfg.get(group)
        if not isinstance(node, Mapping) or key not in node:
            continue
        if text := of(cfg, (group, key)):
            folder, digest = split(text)
            cfg = replaced(cfg, digest or folder, (group, key))
        else:
            cfg[group] = {name: value for name, value in node.items() if name != key or value is not None}
    return cfg
