"""The random model that reads images."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures import pictures
from fixtures.model_folders import option

from runner.models import architecture, tiny_vision, tokenizer_files

pytestmark = pictures.needs_transformers_5


def test_it_is_made_once_and_is_the_same_for_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    made = architecture.resolve(option("tiny_vision")())
    tiny_vision.write(tmp_path / "again", seed=0)
    tiny_vision.write(tmp_path / "other", seed=1)
    weights = [
        (Path(folder) / "model.safetensors").read_bytes()
        for folder in (made.path, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]
    assert tokenizer_files.load(made).processor.image_token == tiny_vision.IMAGE
