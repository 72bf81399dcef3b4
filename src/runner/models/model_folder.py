"""A model's folder: what it must hold (configuration, safetensors weights, tokenizer); writing it all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from runner.errors import ConfigError, Fault

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenizer_config.json")
CONVERT = (
    "convert them where you trust their origin: AutoModelForCausalLM.from_pretrained(DIR, weights_only=True)"
    ".save_pretrained(NEW_DIR), and copy the tokenizer files"
)


def check(folder: Path, *, weights: bool = True) -> None:
    """Refuse a folder that lacks something.

    Raises:
        ConfigError: with all it lacks.
    """
    found = tuple(faults(folder, weights=weights))
    if found:
        raise ConfigError(*found)


def faults(folder: Path, *, weights: bool = True) -> Iterator[Fault]:
    """Everything ``folder`` lacks; cheap, and reads no weights."""
    if not (folder / "config.json").is_file():
        yield from _no_config(folder)
        return
    if not any(list(folder.glob(pattern)) for pattern in TOKENIZERS):
        remedy = "copy the tokenizer files of the model it comes from (tokenizer.json, tokenizer_config.json) into it"
        yield Fault("model.path", "has no tokenizer", remedy, folder)
    if weights:
        yield from _weight_faults(folder)


def damage(file: Path) -> str:
    """What is wrong with a safetensors file, by its length and header (8 bytes n, n bytes of JSON, the tensors)."""
    if not file.is_file():
        return f"is named in {INDEX} and is missing"
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            return "is damaged: the header is cut short or is not safetensors"
        try:
            header = json.loads(handle.read(length))
            end = max(
                (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return "is damaged: the header is not safetensors"
    missing = 8 + length + end - size
    return f"is damaged: it ends {missing} bytes early" if missing > 0 else ""


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` when all is written, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    aside, old = (folder.with_name(f".{folder.name}.{mark}{suffix}") for suffix in ("", ".old"))
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _no_config(folder: Path) -> Iterator[Fault]:
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        problem = "is an adapter, not a model"
        yield Fault("model.path", problem, f"name its base model: model.path={base}", folder)
        return
    ggufs = sorted(folder.glob("*.gguf"))
    remedy = f"name the file: model.path={ggufs[0]}" if ggufs else "name the folder that holds config.json"
    yield Fault("model.path", "is no model folder: config.json is missing", remedy, folder)


def _weight_faults(folder: Path) -> Iterator[Fault]:
    files = _weight_files(folder)
    if not files:
        unsafe = sorted(path.name for pattern in UNSAFE_WEIGHTS for path in folder.glob(pattern))
        if unsafe:
            problem = (
                f"its weights ({', '.join(unsafe[:3])}) are pickles, which can run code: only safetensors are loaded"
            )
            yield Fault("model.path", problem, CONVERT, folder)
        else:
            yield Fault("model.path", f"has no weights ({WEIGHTS})", "fetch the model again, or name another", folder)
    for file in files:
        problem = damage(file)
        if problem:
            yield Fault("model.path", problem, "fetch the file again", file)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
