"""The average of adapters is that of the changes of the weights; of models that of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from runner.errors import ConfigError
from runner.models import averaging


class Small(nn.Module):
    """Two layers and an embedding, of which PEFT makes adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.head = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.words(ids)))


def adapters(folder: Path, count: int = 3, **options: Any) -> list[Path]:
    """Adapters of different weights, saved by PEFT."""
    targets = {"target_modules": ["words", "up"], "modules_to_save": ["head"], "r": 2, "lora_alpha": 6, **options}
    paths = []
    for number in range(count):
        model = get_peft_model(Small(), LoraConfig(**targets))
        torch.manual_seed(number + 1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        paths.append(folder / str(number))
        model.save_pretrained(paths[-1])
    return paths


def merged(folder: Path) -> dict[str, torch.Tensor]:
    whole = PeftModel.from_pretrained(Small(), str(folder)).merge_and_unload()
    return {name: value.detach() for name, value in whole.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"up": 3}, "alpha_pattern": {"up": 5}}])
def test_the_average_of_adapters_changes_the_base_by_the_mean_of_their_changes(tmp_path: Path, options: dict[str, Any]):
    folders = adapters(tmp_path, **options)
    what = averaging.average(folders, tmp_path / "mean")
    assert what == "mean of the changes of 3 adapters, as one of rank 6"
    of_each, found = [merged(folder) for folder in folders], merged(tmp_path / "mean")
    assert len(found) == 5
    for name, tensor in found.items():
        expected = torch.stack([each[name].double() for each in of_each]).mean(0)
        assert torch.allclose(tensor.double(), expected, atol=1e-5), name


def test_the_average_of_models_is_that_of_their_weights(tmp_path: Path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        tensors = {"w": torch.full((2,), float(number), dtype=torch.bfloat16), "n": torch.tensor([7])}
        save_file(tensors, tmp_path / str(number) / "model.safetensors")
    averaging.average([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert (found["w"].tolist(), found["w"].dtype, found["n"].tolist()) == ([0.5, 0.5], torch.bfloat16, [7])
    assert load_file(tmp_path / "0" / "model.safetensors")["w"].tolist() == [0, 0], "the models stay as they are"


def test_what_has_no_average_is_refused(tmp_path: Path):
    plain, dora = adapters(tmp_path / "a", 2), adapters(tmp_path / "d", 2, use_dora=True, target_modules=["up"])
    other = adapters(tmp_path / "r", 1, lora_alpha=7)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({"w": torch.zeros(1)}, whole / "model.safetensors")
    for folders, problem in (
        (dora, "the average of DoRA adapters is no DoRA adapter"),
        ([plain[0], other[0]], "the adapters differ in lora_alpha"),
        ([plain[0], whole], "is of adapters, or of whole models, not of both"),
    ):
        with pytest.raises(ConfigError, match=problem):
            averaging.average(folders, tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
    (plain[1] / "loftq.safetensors").write_bytes(b"another base")
    with pytest.raises(ConfigError, match="the adapters belong to different bases"):
        averaging.average(plain, tmp_path / "mean")
    (plain[1] / "loftq.safetensors").unlink()
    config = json.loads((plain[1] / "adapter_config.json").read_text())
    (plain[1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another"}))
    with pytest.raises(ConfigError, match="the adapters differ in base_model_name_or_path"):
        averaging.average(plain, tmp_path / "mean")
