"""Options of the group model are checked before anything is loaded."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures.model_folders import folder, local, option, source

from runner.errors import ConfigError
from runner.models import sources, tiny


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


def test_every_name_that_is_offered_is_a_hub_id() -> None:
    for name in ("llama", "qwen", "mistral", "gemma", "phi"):
        made = option(name)()
        assert sources.HUB_ID.fullmatch(made.path)
        assert made.make is None
