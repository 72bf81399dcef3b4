"""Weights of another run or model in the configuration: ``lora.start`` and ``task.teacher``.

The user names a run or a folder; a frozen configuration has ``FOLDER@DIGEST`` instead. FOLDER is the folder of that
run, of a plain PEFT adapter (``lora.start``), or of a model or a GGUF file (the teacher); DIGEST is the hash of its
weights. Only DIGEST is part of the signature: the same weights in another folder give the same run. A teacher on the
Hub is not changed: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START = "lora", "start"
TEACHER = "task", "teacher"
KEYS = tuple(map(".".join, (START, TEACHER)))
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT adapter."""
LOFTQ = "loftq.safetensors"
"""Beside an adapter that began with LoftQ: the base that it belongs to (``models.loftq_base``)."""
_FROZEN = re.compile(r"(.+)@([0-9a-f]{32})", re.DOTALL)


def split(text: str) -> tuple[str, str]:
    """(RUN or FOLDER, DIGEST); the digest is empty in what a user types."""
    match = _FROZEN.fullmatch(text)
    return (match[1], match[2]) if match else (text, "")


def joined(folder: Path | str, digest: str) -> str:
    return f"{folder}@{digest}"


def of(cfg: Mapping[str, Any], key: tuple[str, str] = START) -> str:
    """The value of ``lora.start`` (or of the teacher, but not of a task of the user's own); empty without one."""
    node = cfg.get(key[0])
    if not isinstance(node, Mapping) or (key == TEACHER and not str(node.get("_target_")).startswith("runner.")):
        return ""
    value = node.get(key[1])
    return value if isinstance(value, str) else ""


def adapter_in(folder: Path) -> Path:
    """The folder with the adapter: ``folder`` itself, or ``model/`` of a run folder."""
    return folder if (folder / ADAPTER).is_file() else folder / "model"


def replaced(cfg: Mapping[str, Any], text: str, key: tuple[str, str] = START) -> dict[str, Any]:
    """The configuration with another value of ``lora.start`` (or of the teacher)."""
    return {**cfg, key[0]: {**cfg[key[0]], key[1]: text}}


def without_folders(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with digests only. A key that is null is left out: earlier versions did not have it."""
    cfg = dict(cfg)
    for group, name in (START, TEACHER):
        node = cfg.get(group)
        if not isinstance(node, Mapping) or name not in node:
            continue
        if text := of(cfg, (group, name)):
            folder, digest = split(text)
            cfg = replaced(cfg, digest or folder, (group, name))
        else:
            cfg[group] = {each: value for each, value in node.items() if each != name or value is not None}
    return cfg
