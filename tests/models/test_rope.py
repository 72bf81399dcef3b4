"""RoPE scaling: against plain transformers with the same configuration; saved with the run; refused where it is not."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, composed
from fixtures import versions
from fixtures.model_folders import change_config, folder, ids, local, source
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from runner.cli import main
from runner.cli.args import trained_run
from runner.errors import ConfigError
from runner.models import architecture, pretrained
from runner.models.quantization import none
from runner.models.sources import ModelSource
from runner.tracking import manifest
from runner.tracking.rundir import RunDir
from runner.train import trained_model

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {"type": "yarn", "factor": 2.0, "beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "original_max_position_embeddings": 2048},
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 512},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 512},
    ),
}
"""What the user sets, and what transformers is given."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    positions = torch.arange(3000, 3020).repeat(2, 1)
    return model.eval()(input_ids=ids(), position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_logits_are_those_of_transformers_with_this_configuration(
    kind: str, source: ModelSource, folder: Path
) -> None:
    given, theirs = SCALINGS[kind]
    scaled = pretrained.load(local(folder, rope_scaling=given), none.none(), "cpu")
    assert scaled.config.max_position_embeddings == {"linear": 8192, "yarn": 4096, "llama3": 4096}[kind]
    before = logits(pretrained.load(local(folder), none.none(), "cpu"))
    theta = scaled.config.rope_parameters["rope_theta"]
    change_config(folder, rope_parameters={**theirs, "rope_theta": theta})
    plain = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits(scaled), plain)
    assert not torch.equal(before, plain)


def test_a_model_that_is_scaled_already_is_scaled_from_its_pretraining(folder: Path) -> None:
    theta = 1e4
    change_config(
        folder,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": theta},
    )
    config = architecture.read(local(folder, rope_scaling={"rope_type": "yarn", "factor": 8}))
    assert config.max_position_embeddings == 16384
    assert config.rope_parameters == {
        "rope_type": "yarn", "factor": 8.0, "rope_theta": theta, "original_max_position_embeddings": 2048
    }  # fmt: skip


def test_gemma_scales_its_layers_without_a_window() -> None:
    from runner.models import rope

    config = versions.known(versions.config("Gemma3TextConfig", max_position_embeddings=1024))
    rope.configure(config, {"rope_type": "linear", "factor": 8}, None)
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.max_position_embeddings == 8192


@pytest.mark.parametrize("key", ["rope_scaling", "max_position_embeddings"])
def test_a_model_with_learned_positions_is_refused(key: str, folder: Path) -> None:
    transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=300).save_pretrained(folder)
    value: Any = {"rope_type": "linear", "factor": 4} if key == "rope_scaling" else 4096
    with pytest.raises(ConfigError, match=rf"model\.{key}: this model has no rotary position embeddings"):
        architecture.read(local(folder, **{key: value}))


def test_more_positions_without_scaling(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"supports 2048 positions at most\n.*or scale its positions"):
        architecture.check_max_length(local(folder), 4096)
    architecture.check_max_length(local(folder, max_position_embeddings=4096), 4096)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ("{factor:4}", "model.rope_scaling.rope_type=: is no kind of RoPE scaling that can be set here"),
        ("{rope_type:yarm,factor:4}", "rope_type=yarm: is no kind of RoPE scaling"),
        ("{rope_type:dynamic,factor:4}", "rope_type=dynamic: chooses the frequencies by the longest document"),
        ("{rope_type:linear}", "model.rope_scaling.factor: is missing, and linear needs it"),
        ("{rope_type:linear,factor:1}", "model.rope_scaling.factor=1: must be a finite number > 1"),
        ("{rope_type:yarn,factor:2,beta_fst:3}", "beta_fst=3: no such key. did you mean 'beta_fast'?"),
        ("{rope_type:llama3,factor:2,low_freq_factor:1}", "high_freq_factor: is missing, and llama3 needs it"),
    ],
)
def test_wrong_values(scaling: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed("model=tiny", f"model.rope_scaling={scaling}")
    assert said in str(refused.value)


def test_positions_and_scaling_together_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_position_embeddings=64: is computed from rope_scaling\.factor"):
        local(folder, rope_scaling={"rope_type": "linear", "factor": 2}, max_position_embeddings=64)


def test_a_run_trains_longer_rows_and_is_loaded_with_its_scaling(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    monkeypatch.chdir(tmp_path)
    short = (*TINY, "model.max_position_embeddings=64", "train.max_steps=2", "optim.learning_rate=0.02")
    scaled = ("model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=2")
    assert main.run(["plan", *short]) == 2
    assert main.run(["plan", *short, *scaled]) == 0
    assert "random-64x2, RoPE yarn × 2, " in capsys.readouterr().out
    assert main.run([*short, *scaled, "hydra.run.dir=run"]) == 0
    run = RunDir(tmp_path / "run")
    config = AutoConfig.from_pretrained(run.model)
    assert config.rope_parameters["rope_type"] == "yarn"
    base = str(run.read_manifest()["model"]["path"])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, config=config), run.model)
    of_run = trained_model.Trained(run, manifest.read_config(run))
    expected = logits(trained_model.load(of_run, "cpu"))
    torch.testing.assert_close(logits(theirs), expected)
    assert main.run(["export", "run", "merged", "--merged"]) == 0
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("merged")), expected, atol=1e-4, rtol=1e-4)
    assert main.run(["export", "run", "adapter"]) == 0
    card = Path("adapter/README.md").read_text()
    assert "config = AutoConfig.from_pretrained(folder)" in card
    assert ", config=config)" in card


def test_the_changes_hold_for_a_base_that_has_moved(tmp_path: Path, source: ModelSource) -> None:
    from runner.train.options import Options

    scaling = {"rope_type": "linear", "factor": 2.0}
    words = ("model.rope_scaling={rope_type:linear,factor:2.0}", "model.new_tokens=[a_b]")
    for model, positions in (("model=tiny", ""), ("model=local", f"model.path={source.path}")):
        options = Options(composed(model, *words, *filter(None, [positions])))
        moved = options.model_in(source.path, is_base=True)
        assert (moved.rope_scaling, moved.new_tokens, moved.max_position_embeddings) == (scaling, ("a_b",), None)
        assert options.model_in(source.path).rope_scaling is None
