"""An adapter that begins with the weights of a saved one, which must be of the same kind, shape and base."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import option
from fixtures.adapters import load
from fixtures.model_folders import source

from runner.errors import ConfigError
from runner.models import adapter, warm_start
from runner.models.sources import ModelSource


@pytest.fixture
def saved(source: ModelSource, tmp_path: Path) -> Path:
    """An adapter of rank 8 whose weights are not those of a new one."""
    model = option("lora", "lora", r=8)(load(source))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    adapter.save(model, tmp_path, adapter.state(model))
    return tmp_path


def started(source: ModelSource, folder: Path, **changes: Any) -> Any:
    return option("lora", "lora", **{"r": 8, "start": str(folder), **changes})(load(source))


def test_it_begins_with_the_saved_weights_and_trains_on(source: ModelSource, saved: Path) -> None:
    model = started(source, saved, lora_dropout=0.1)
    tensors = adapter.state(model)
    assert tensors
    assert all(bool((tensor == 0.5).all()) for tensor in tensors.values())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_what_does_not_fit_is_named_with_the_value_to_set(source: ModelSource, saved: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        started(source, saved, r=4, use_rslora=True)
    text = str(caught.value)
    assert "lora.r=4: the adapter of lora.start has 8" in text
    assert "set lora.r=8, or leave lora.start out" in text
    assert "lora.use_rslora=True: the adapter of lora.start has false" in text


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("adapter_model.safetensors", None, "adapter_model.safetensors does not exist"),
        ("adapter_model.safetensors", b"short", "is damaged: the header is truncated"),
        ("adapter_config.json", b"[]", "adapter_config.json cannot be read as a JSON object"),
    ],
)
def test_a_damaged_adapter_is_named(
    source: ModelSource, saved: Path, file: str, content: bytes | None, problem: str
) -> None:
    (saved / file).unlink() if content is None else (saved / file).write_bytes(content)
    with pytest.raises(ConfigError, match=r"lora\.start") as caught:
        started(source, saved)
    assert problem in str(caught.value)


def test_weights_without_their_configuration_are_one_message(source: ModelSource, saved: Path, tmp_path: Path) -> None:
    """The configuration of a run's copy may be lost later than the run was prepared."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (saved / "adapter_model.safetensors").rename(folder / "model" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read as a JSON object"):
        warm_start.begin_with(option("lora", "lora", r=8)(load(source)), str(folder))


def test_another_base_model_is_refused(source: ModelSource, saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/models/other"}))
    with pytest.raises(ConfigError, match="the adapter was trained on /models/other"):
        started(source, saved)
