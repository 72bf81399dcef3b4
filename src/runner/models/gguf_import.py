"""From a GGUF file to a folder that trains: float32 safetensors, configuration, tokenizer and chat template.

Weights of a GGUF file can be dequantized but not trained, and transformers needs about 20 s to read them. So the work
is done once, and what comes out is an ordinary model folder.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, Fault

MAGIC = b"GGUF"
STRING = 8
"""The type number of a text in GGUF's metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""


def convert(file: Path, folder: Path) -> None:
    """Write the model in ``file`` to ``folder`` as transformers reads it.

    Raises:
        ConfigError: not a GGUF file, a damaged one, or an architecture that transformers cannot convert.
    """
    check(file)
    try:
        model, tokenizer = _read(file)
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        problem = f"cannot be converted: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise ConfigError(
            Fault("model.path", problem, "fetch the file again, or use the safetensors model", file)
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(file: Path) -> None:
    """Refuse what is no GGUF file, by its first four bytes."""
    if not file.is_file():
        raise ConfigError(Fault("model.path", "no such file", "name a GGUF file", file))
    with file.open("rb") as handle:
        if handle.read(4) != MAGIC:
            raise ConfigError(Fault("model.path", "is not a GGUF file", "name a GGUF file", file))


def _read(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where)
    # A model from a GGUF counts as quantized and cannot be saved: its weights move into one that never was.
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
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _restore_splitting(tokenizer, read_text(file, "tokenizer.ggml.pre"))
    return model, tokenizer


def _restore_splitting(tokenizer: Any, name: str | None) -> None:
    """SmolLM splits digits off before its merges apply; transformers 5.23 does not know this ``tokenizer.ggml.pre``."""
    from tokenizers import pre_tokenizers

    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def read_text(file: Path, key: str) -> str | None:
    """A text of the metadata, found without parsing the rest (which takes seconds); None where there is none."""
    name = struct.pack("<Q", len(key)) + key.encode()
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(name)
        if start < 0:
            return None
        kind, length = struct.unpack_from("<IQ", content, start + len(name))
        start += len(name) + 12
        return content[start : start + length].decode() if kind == STRING else None
