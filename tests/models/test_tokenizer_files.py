"""The tokenizer of a model, with a padding token."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.model_folders import change_config, folder, ids, local, refusal, source
from transformers import AutoTokenizer

from runner.models import tokenizer_files


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
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # transformers 4 does not write it
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": 5}))
    assert "its chat_template is not a text" in refusal(folder)


def test_token_ids_beyond_the_embeddings_though_tokens_are_few(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 300
    path.write_text(json.dumps(content))
    assert "has token ids up to 300, but the model has 259 embeddings" in refusal(folder)


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
