"""Check that a model folder is complete: configuration, safetensors weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import Fault, refuse

NOT_JSON = "cannot be read as a JSON object: it is damaged, missing or not readable"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenizer_config.json")
CONVERT = (
    "if you trust their origin, convert them: AutoModelForCausalLM.from_pretrained(DIR, weights_only=True)"
    ".save_pretrained(NEW_DIR), then copy the tokenizer files"
)


def check(folder: Path, *, weights: bool = True) -> None:
    """Check that a model folder is complete; ``weights`` False: without checking the weights."""
    refuse(faults(folder, weights=weights))


def faults(folder: Path, *, weights: bool = True) -> Iterator[Fault]:
    """Everything that is missing or damaged in ``folder``; fast, as it reads only the headers of weight files."""
    if not (folder / "config.json").is_file():
        yield from _no_config(folder)
        return
    if read_json(folder / "config.json") is None:
        yield Fault("model.path", NOT_JSON, "copy the file of the original model", folder / "config.json")
    if not any(list(folder.glob(pattern)) for pattern in TOKENIZERS):
        remedy = (
            "copy the tokenizer files of the original model (tokenizer.json, tokenizer_config.json) into the folder"
        )
        yield Fault("model.path", "has no tokenizer", remedy, folder)
    if weights:
        yield from _weight_faults(folder)


def damage(file: Path) -> str:
    """The problem of a safetensors file, or "". Checks its size and header (8 bytes n, n bytes of JSON, tensors)."""
    if not file.is_file():
        return f"is listed in {INDEX} but missing"
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            return "is damaged: the header is truncated or not safetensors"
        try:
            header = json.loads(handle.read(length))
            ends = (int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__")
            end = max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return "is damaged: the header is not safetensors"
    missing = 8 + length + end - size
    return f"is damaged: the last {missing} bytes are missing" if missing > 0 else ""


def _no_config(folder: Path) -> Iterator[Fault]:
    if (folder / "adapter_config.json").is_file():
        base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
        problem = "is an adapter, not a model"
        remedy = f"set it to the adapter's base model: model.path={base}; to train it further: lora.start={folder}"
        yield Fault("model.path", problem, remedy, folder)
        return
    if (folder / "model" / "config.json").is_file():
        yield Fault("model.path", "is a run folder, not a model folder", f"set it to {folder / 'model'}", folder)
        return
    if (folder / "model" / "adapter_config.json").is_file():
        remedy = f"keep the base model of that run, and set lora.start={folder} to train its adapter further"
        yield Fault("model.path", "is a run folder with an adapter, not a model folder", remedy, folder)
        return
    ggufs = sorted(folder.glob("*.gguf"))
    remedy = f"set it to the file: model.path={ggufs[0]}" if ggufs else "set it to the folder that contains config.json"
    yield Fault("model.path", "is not a model folder: config.json is missing", remedy, folder)


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file cannot be read, or holds something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _weight_faults(folder: Path) -> Iterator[Fault]:
    try:
        files = weight_files(folder)
    except (TypeError, AttributeError):
        yield Fault("model.path", "is damaged: weight_map is missing", "download the file again", folder / INDEX)
        return
    if not files:
        unsafe = sorted(path.name for pattern in UNSAFE_WEIGHTS for path in folder.glob(pattern))
        if unsafe:
            names = ", ".join(unsafe[:3])
            problem = f"its weights ({names}) are pickle files, which can run code: only safetensors are supported"
            yield Fault("model.path", problem, CONVERT, folder)
        else:
            remedy = "download the model again, or use another one"
            yield Fault("model.path", f"has no weights ({WEIGHTS})", remedy, folder)
    for file in files:
        if problem := damage(file):
            yield Fault("model.path", problem, "download the file again", file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights of a model folder; empty if there are none."""
    if (folder / INDEX).is_file():
        weight_map = (read_json(folder / INDEX) or {}).get("weight_map")
        return [folder / name for name in sorted(set(weight_map.values()))]  # type: ignore[union-attr]
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []


def stored_dtypes(file: Path) -> set[str]:
    """The dtypes of the tensors in a safetensors file, by its own names: ``BF16``, ``F32`` …; reads only the header."""
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
