"""The random model that tests train."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fixtures.model_folders import option, source

from runner.models import architecture, tiny, tokenizer_files
from runner.models.kernels import compat
from runner.models.sources import ModelSource

# Random models --------------------------------------------------------------------------------------------------------


def test_tiny_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    made = architecture.resolve(option("tiny")())
    written = (Path(made.path) / "model.safetensors").stat()
    assert architecture.resolve(option("tiny")()).path == made.path
    assert (Path(made.path) / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    assert architecture.resolve(option("tiny", layers=1)()).path != made.path


def test_tiny_is_the_same_for_everyone(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)
        tiny.write(tmp_path / name, seed=seed, **shape)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_byte_tokenizer_gives_back_every_text(source: ModelSource) -> None:
    tokenizer = tokenizer_files.load(source)
    text = "Zoë  said:\n\t“naïve” 🙂 ½ \x00 <|im_end|>"
    encoded = tokenizer(text)["input_ids"]
    assert tokenizer.decode(encoded) == text
    assert len(encoded) == len(text.replace("<|im_end|>", "").encode()) + 1
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    talk = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_several_processes_make_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: architecture.resolve(option("tiny")()).path, range(4)))
    assert len(made) == 1
    assert [path.name for path in (tmp_path / compat.model_cache()).iterdir() if path.is_dir()] == [
        Path(made.pop()).name
    ]
