"""Convert a GGUF file to a model folder: float32 safetensors, configuration, tokenizer and chat template.

transformers can load a GGUF file (in about 20 s) but not train its weights. The file is therefore converted once.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, Fault, first_line

MAGIC = b"GGUF"
STRING = 8
"""The type code of a string in GGUF metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""


def convert(file: Path, folder: Path) -> None:
    """Convert ``file`` to the model folder ``folder``.

    Raises:
        ConfigError: not a GGUF file, a damaged file, or an architecture that transformers cannot convert.
    """
    check(file)
    try:
        model, tokenizer = _read(file)
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        problem = f"cannot be converted: {first_line(error)}"
        remedy = "download the file again, or use the safetensors version of the model"
        raise ConfigError(Fault("model.path", problem, remedy, file)) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(file: Path) -> None:
    """Check the first four bytes of a GGUF file."""
    if not file.is_file():
        raise ConfigError(Fault("model.path", "no such file", "set it to a GGUF file", file))
    with file.open("rb") as handle:
        if handle.read(4) != MAGIC:
            raise ConfigError(Fault("model.path", "is not a GGUF file", "set it to a GGUF file", file))


def _read(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**location)
    # transformers treats a model loaded from GGUF as quantized and does not save it: copy the weights to a new model.
    config = loaded.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    config.architectures = [type(loaded).__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {name: tensor.float() for name, tensor in loaded.state_dict().items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**location)
    _restore_pre_tokenizer(tokenizer, read_text(file, "tokenizer.ggml.pre"))
    return model, tokenizer


def _restore_pre_tokenizer(tokenizer: Any, name: str | None) -> None:
    """Restore SmolLM's pre-tokenizer, which splits digits: transformers 5.23 ignores ``tokenizer.ggml.pre=smollm``."""
    from tokenizers import pre_tokenizers

    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def read_text(file: Path, key: str) -> str | None:
    """Read one string of the metadata by searching for its key; parsing everything takes seconds. None if missing."""
    name = struct.pack("<Q", len(key)) + key.encode()
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(name)
        if start < 0:
            return None
        kind, length = struct.unpack_from("<IQ", content, start + len(name))
        start += len(name) + 12
        return content[start : start + length].decode() if kind == STRING else None
