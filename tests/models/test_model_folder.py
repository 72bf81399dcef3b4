"""Folders of models that cannot be loaded are refused by what they lack."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.model_folders import folder, ids, local, option, refusal, source

from runner.models import pretrained, tokenizer_files
from runner.models.quantization import none
from runner.models.sources import ModelSource


def test_binding_the_default_reads_no_weights() -> None:
    read = Path("/proc/self/io")
    before = int(read.read_text().split()[1])
    made = option("smollm2")()
    assert int(read.read_text().split()[1]) - before < 10e6, "bytes of a file of 100 MB"
    assert made.name == "SmolLM2-135M-Instruct.Q4_1"


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
    model = pretrained.load(source, none.none(), "cpu")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    tokenizer_files.load(source).save_pretrained(tmp_path / "sharded")
    whole = pretrained.load(local(tmp_path / "sharded"), none.none(), "cpu")
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
    assert "config.json: cannot be read as a JSON object" in refused
    assert "index.json: is damaged: weight_map is missing" in refused


def test_a_save_that_fails_leaves_what_was_there(source: ModelSource, tmp_path: Path) -> None:
    model, tokenizer = pretrained.load(source, none.none(), "cpu"), tokenizer_files.load(source)
    pretrained.save(model, tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(AttributeError):
        pretrained.save(model, None, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
