"""Models: made, converted, fetched, loaded, saved; and every way in which one cannot be had."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model_folders import folder, ids, local, option, refusal, source
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig

from runner.errors import ConfigError
from runner.models import architecture, parameters, pretrained, tiny, tokenizer_files
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


def test_dtype_is_what_was_asked(folder: Path) -> None:
    model = pretrained.load(local(folder, dtype="bfloat16"), none.none(), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}),
        ("tokenizer.json", {"model": {"type": "no such model"}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "nothing"}}),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}),
    ],
)
def test_a_broken_tokenizer(folder: Path, file: str, changes: dict[str, Any] | None) -> None:
    path = folder / file
    path.write_text("{" if changes is None else json.dumps({**json.loads(path.read_text()), **changes}))
    assert "its tokenizer cannot be loaded" in refusal(folder)


def test_a_chat_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": 5}))
    assert "its chat_template is not a text" in refusal(folder)


def test_token_ids_beyond_the_embeddings_though_tokens_are_few(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 300
    path.write_text(json.dumps(content))
    assert "has token ids up to 300, but the model has 259 embeddings" in refusal(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 128}, "cannot be loaded"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_act": "no such function"}, "cannot be loaded"),
        ({"num_hidden_layers": None}, "cannot be loaded"),
        ({"model_type": "nobody-knows"}, "cannot be loaded"),
        ({"vocab_size": 100}, "its tokenizer has token ids up to 258, but the model has 100 embeddings"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "its weights are already quantized",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            "model.trust_remote_code=False: ",
        ),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, Any], said: str) -> None:
    change_config(folder, **changes)
    assert said in refusal(folder)


def test_code_of_the_models_own_runs_only_when_trusted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): model_type = 'own'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(folder, model_type="own", auto_map=names, architectures=["Model"])
    assert "set model.trust_remote_code=true" in refusal(folder)
    model = pretrained.load(architecture.resolve(local(folder, trust_remote_code=True)), none.none(), "cpu")
    assert type(model).__name__ == "Model"
    assert "runs on this machine" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden_size": 60}, "multiple of 2 × heads"), ({"kv_heads": 3}, "must divide heads"), ({"layers": 0}, ">= 1")],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        option("tiny", **changes)
    assert said in str(refused.value)


# Length, padding, counting --------------------------------------------------------------------------------------------


def test_rows_longer_than_the_model_are_refused(source: ModelSource) -> None:
    architecture.check_max_length(source, 2048)
    with pytest.raises(ConfigError, match=r"data\.max_length=2049: random-64x2 supports 2048 positions"):
        architecture.check_max_length(source, 2049)


@pytest.mark.parametrize(
    ("added", "expected"),
    [([], "<|im_end|>"), (["<unk>"], "<unk>"), (["<unk>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>")],
)
def test_a_missing_padding_token_is_chosen_without_resizing(folder: Path, added: list[str], expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|pad|>", "<|other|>")
        (folder / name).write_text(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(folder, vocab_size=264)
    assert tokenizer_files.load(local(folder)).pad_token == expected


def test_an_empty_model_counts_like_the_real_one(source: ModelSource) -> None:
    empty, real = pretrained.empty(source, none.none()), pretrained.load(source, none.none(), "cpu")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert parameters.describe(empty) == parameters.describe(real)
    counts = parameters.describe(real)
    assert counts["total"] == sum(p.numel() for p in real.parameters())
    assert counts["total"] == counts["embedding"] + counts["linear"] + counts["other"]
    assert (counts["quantized"], counts["stored"], counts["dtype"]) == (0, "float32", "float32")


def test_an_untied_head_is_counted_apart(cache: Path) -> None:
    made = architecture.resolve(option("tiny", tie_word_embeddings=False)())
    counts = parameters.describe(pretrained.empty(made, none.none()))
    assert counts["head"] == counts["embedding"] == 259 * 64


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
