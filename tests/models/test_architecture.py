"""The configuration of a model, read without its weights."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures.model_folders import change_config, folder, ids, local, refusal, source

from runner.errors import ConfigError
from runner.models import architecture, pretrained
from runner.models.quantization import none
from runner.models.sources import ModelSource


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
            {"quantization_config": {"quant_method": "hqq", "bits": 4}},
            "its weights are quantized (hqq); only those of",
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


def test_rows_longer_than_the_model_are_refused(source: ModelSource) -> None:
    architecture.check_max_length(source, 2048)
    with pytest.raises(ConfigError, match=r"data\.max_length=2049: random-64x2 supports 2048 positions"):
        architecture.check_max_length(source, 2049)
