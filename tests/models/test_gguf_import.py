"""A GGUF becomes an ordinary folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model_folders import local, option
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.errors import ConfigError
from runner.models import architecture, gguf_import, parameters, pretrained
from runner.models.kernels import compat
from runner.models.quantization import none

# GGUF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_converted_to_an_ordinary_folder(cache: Path) -> None:
    from gguf import GGUFReader, dequantize

    made = architecture.resolve(option("smollm2")())
    file = Path(option("smollm2")().path)
    assert Path(made.path).name.endswith(hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    plain = AutoModelForCausalLM.from_pretrained(made.path)
    assert not hasattr(plain.config, "quantization_config")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    stored = tensors["blk.7.ffn_up.weight"]
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
    assert torch.equal(plain.model.layers[7].mlp.up_proj.weight, expected)
    counts = parameters.describe(pretrained.load(made, none.none(), "cpu"))
    assert (counts["total"], counts["linear"], counts["embedding"]) == (134515008, 106168320, 49152 * 576)


@pytest.mark.slow
def test_smollm2_keeps_tokenizer_template_and_sense(cache: Path) -> None:
    made = architecture.resolve(option("smollm2")())
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    # SmolLM splits digits off first: two spaces before a number stay together
    assert tokenizer.tokenize("a  123") == ["a", "ĠĠ", "1", "2", "3"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith(
        "<|im_start|>system"
    )
    model = pretrained.load(made, none.none(), "cpu").eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said


def test_a_text_of_the_metadata_is_found_without_reading_the_rest() -> None:
    file = Path(option("smollm2")().path)
    assert gguf_import.read_text(file, "tokenizer.ggml.pre") == "smollm"
    assert gguf_import.read_text(file, "general.architecture") == "llama"
    assert gguf_import.read_text(file, "no.such.key") is None
    assert gguf_import.read_text(file, "llama.block_count") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"package": "no_such_package"}, "pip install no-such-package"),
        ({"file": "other.gguf"}, "model.file=other.gguf: no such file"),
        ({"file": "__init__.py"}, "is not a GGUF file"),
        ({"dtype": "float16"}, "model.dtype=float16: not supported: float16 gradients underflow"),
        ({"dtype": "bf16"}, "did you mean 'bfloat16'?"),
        ({"device_map": "auto"}, "training places the whole model on its own device"),
    ],
)
def test_bad_values_of_smollm2(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        option("smollm2", **changes)
    assert said in str(refused.value)


def test_a_damaged_gguf_leaves_nothing_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "cut.gguf"
    file.write_bytes(Path(option("smollm2")().path).read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot be converted"):
        architecture.resolve(local(file))
    assert not [path for path in (tmp_path / "cache" / compat.model_cache()).iterdir() if path.is_dir()]
