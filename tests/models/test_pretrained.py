"""Models: made, converted, fetched, loaded, saved; and every way in which one cannot be had."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model_folders import folder, ids, local, option, source
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig

from runner.errors import ConfigError
from runner.models import architecture, pretrained, tokenizer_files
from runner.models.quantization import none
from runner.models.sources import ModelSource

# Local folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_plain_transformers_does(source: ModelSource, folder: Path) -> None:
    model = pretrained.load(architecture.resolve(local(folder)), none.none(), "cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.eval()(input_ids=ids()).logits, plain.eval()(input_ids=ids()).logits)
    assert model.config.use_cache is False
    assert {str(p.device) for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("attention", ["auto", "by_document", "sdpa", "eager"])
def test_attention_is_what_was_asked(folder: Path, attention: str) -> None:
    model = pretrained.load(local(folder, attention=attention), none.none(), "cpu")
    assert model.config._attn_implementation == ("eager" if attention == "eager" else "sdpa")


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_family_without_sdpa_is_loaded_with_eager_attention(folder: Path, attention: str) -> None:
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
    AutoModelForCausalLM.from_config(GPTJConfig(**sizes)).save_pretrained(folder)
    source = architecture.resolve(local(folder, attention=attention))
    if attention == "auto":
        assert pretrained.load(source, none.none(), "cpu").config._attn_implementation == "eager"
        assert pretrained.empty(source, none.none()).config._attn_implementation == "eager"
    else:
        with pytest.raises(ConfigError, match=r"model\.attention=sdpa: .*\n.*use model\.attention=auto"):
            pretrained.load(source, none.none(), "cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden_size": 60}, "multiple of 2 × heads"), ({"kv_heads": 3}, "must divide heads"), ({"layers": 0}, ">= 1")],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        option("tiny", **changes)
    assert said in str(refused.value)


# Length, padding, counting --------------------------------------------------------------------------------------------


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_read_back_by_plain_transformers(cache: Path, tmp_path: Path, tied: bool) -> None:
    made = architecture.resolve(option("tiny", tie_word_embeddings=tied)())
    model, tokenizer = pretrained.load(made, none.none(), "cpu"), tokenizer_files.load(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    pretrained.save(model, tokenizer, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(plain.eval()(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
    assert plain.config.use_cache is True
    assert model.config.use_cache is False
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("hello <|im_end|>")["input_ids"] == tokenizer("hello <|im_end|>")["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    pretrained.load(local(tmp_path / "model"), none.none(), "cpu")


def test_a_published_temperature_without_sampling_can_be_saved(source: ModelSource, tmp_path: Path) -> None:
    model = pretrained.load(source, none.none(), "cpu")
    model.generation_config.temperature = 0.6
    pretrained.save(model, tokenizer_files.load(source), tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, True)
