"""The protocol: a back end of the user's own, and models of which little or nothing can be quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, option

from runner.cli import main
from runner.errors import ConfigError
from runner.models import parameters, pretrained
from runner.models.sources import ModelSource
from runner.tracking.rundir import RunDir

OWN = """
from dataclasses import dataclass
from runner.models.quantization.quant import Quant

@dataclass(frozen=True)
class Half(Quant):
    name: str = "float16 (my own)"
    graph_breaks: str = "my layers break graphs"
    unpacks: bool = True

    def holds(self, layer):
        import torch
        return getattr(getattr(layer, "weight", None), "dtype", None) == torch.float16

    def bytes_of(self, rows, columns):
        return 2 * rows * columns

    def after_load(self, model):
        import torch
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.weight.data = layer.weight.data.half()

def half():
    return Half()
"""
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("lab.py").write_text(OWN)
    return tmp_path


def test_a_back_end_of_ones_own_is_planned_trained_and_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["code=lab.py", "quant=half", *TINY, "model.dtype=float32", "train.max_steps=2"]
    assert main.run(["plan", *words]) == 0
    assert "weights in float16 (my own)" in capfd.readouterr().out
    assert main.run([*words, "hydra.run.dir=run"]) == 0
    assert "weights in float16 (my own)" in RunDir(folder / "run").log.read_text()


def test_what_does_not_work_on_it_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "code=lab.py", "quant=half", "lora=none", *TINY]) == 2
    assert "full fine-tuning does not support quantized weights" in capfd.readouterr().err
    assert main.run(["plan", "code=lab.py", "quant=half", "lora=peft", "lora.method=ia3", *TINY]) == 2
    assert "does not work on weights in float16 (my own)" in capfd.readouterr().err


def source(folder: Path, config: transformers.PretrainedConfig) -> ModelSource:
    config.save_pretrained(folder)
    return ModelSource(str(folder), None, "float32", "sdpa", False, "small")


def test_a_model_of_which_nothing_would_be_quantized_is_refused(tmp_path: Path) -> None:
    falcon = source(tmp_path, transformers.FalconConfig(**SIZES))  # its linear layers are a class of its own
    with pytest.raises(ConfigError, match="FalconForCausalLM has no layer that can be stored as nf4"):
        pretrained.empty(falcon, option("quant", "4bit")())


def test_experts_that_stay_in_the_dtype_of_the_model_are_named(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 48, "num_local_experts": 4}
    mixtral = source(tmp_path, transformers.MixtralConfig(**sizes))
    quant = option("quant", "4bit")()
    model = option("lora", "lora", target_modules=["q_proj"])(pretrained.empty(mixtral, quant))
    counts = parameters.describe(model)
    assert (counts["quantized"], counts["experts"]) == (4 * 32 * 32, 4 * 3 * 32 * 48)
    assert counts["stored"] == (
        "nf4 (bitsandbytes) (18% of the layers' weights, not the experts; the others in float32)"
    )
    assert counts["about_experts"] == "the experts have no adapter"
    whole = option("lora", "lora", target_modules="all-linear")(pretrained.empty(mixtral, quant))
    assert parameters.describe(whole)["about_experts"] == "100% of the experts' weights have an adapter"


def test_conv1d_layers_are_counted_as_bitsandbytes_replaces_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=64)
    gpt2 = source(tmp_path, config)
    model = transformers.GPT2LMHeadModel(config)
    chosen = option("quant", "8bit")()
    model.save_pretrained(tmp_path)
    real = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, quantization_config=chosen.library_config("cpu"), device_map={"": "cpu"}
    )
    real.quant = chosen
    counts = parameters.describe(pretrained.empty(gpt2, chosen))
    assert counts["quantized"] == parameters.describe(real)["quantized"] == 12 * 32 * 32
    assert counts["stored"] == "int8 (bitsandbytes)"
