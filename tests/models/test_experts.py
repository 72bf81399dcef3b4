"""Mixtures of experts: adapters on the tensors of all experts, counted, saved, merged; and what cannot be adapted."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, composed, node, option
from fixtures import versions
from fixtures.mixtures_of_experts import mixture
from fixtures.model_folders import source
from transformers import AutoModelForCausalLM

from runner.cli import main
from runner.config.bind import find_faults
from runner.errors import ConfigError
from runner.models import parameters, pretrained
from runner.models.quantization import none
from runner.models.sources import ModelSource
from runner.tracking import manifest
from runner.tracking.rundir import RunDir
from runner.train import trained_model

NAMES = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def adapted(folder: Path, **changes: Any) -> Any:
    base = pretrained.load(ModelSource(str(folder), None, "float32", "auto", False, "moe"), none.none(), "cpu")
    return option("lora", "lora", **changes)(base)


def test_each_expert_has_an_adapter_and_the_share_is_counted(mixture: Path) -> None:
    attention = {"target_modules": ["q_proj"]}
    assert parameters.describe(adapted(mixture, **attention))["about_experts"] == "the experts have no adapter"
    one = adapted(mixture, **attention, target_parameters=["mlp.experts.down_proj"])
    assert parameters.describe(one)["about_experts"] == "33% of the experts' weights have an adapter"
    model = adapted(mixture, **attention, target_parameters="experts", r=2)
    assert parameters.describe(model)["about_experts"] == "100% of the experts' weights have an adapter"
    assert sorted(model.peft_config["default"].target_parameters) == NAMES
    of_experts = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if "layers.0.mlp.experts" in name and "lora" in name
    }
    assert len(of_experts) == 4
    assert {shape[0] if "lora_A" in name else shape[1] for name, shape in of_experts.items()} == {2 * 4}


def test_full_fine_tuning_of_a_part_names_the_experts(mixture: Path) -> None:
    base = pretrained.load(ModelSource(str(mixture), None, "float32", "auto", False, "moe"), none.none(), "cpu")
    assert parameters.describe(option("lora", "none")(base))["about_experts"] == ""
    assert parameters.describe(option("lora", "none", trainable="self_attn")(base))["about_experts"] == (
        "the experts are not trained"
    )
    assert parameters.describe(option("lora", "none", trainable_layers=1)(base))["about_experts"] == (
        "50% of the experts' weights are trained"
    )


def test_a_run_trains_them_and_merges_them(
    mixture: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    monkeypatch.chdir(tmp_path)
    words = [word for word in TINY if word != "model=tiny"] + [
        "model=local", f"model.path={mixture}", "lora.target_modules=[q_proj]", "lora.target_parameters=experts",
        "train.max_steps=2",
        "optim.learning_rate=0.02",
    ]  # fmt: skip
    assert main.run(["plan", *words]) == 0
    assert "100% of the experts' weights have an adapter" in capsys.readouterr().out
    assert main.run([*words, "hydra.run.dir=run"]) == 0
    assert "100% of the experts' weights have an adapter" in capsys.readouterr().err
    run = RunDir(tmp_path / "run")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = trained_model.load(trained_model.Trained(run, manifest.read_config(run)), "cpu")(
            input_ids=ids
        ).logits
        plain = AutoModelForCausalLM.from_pretrained(mixture)
        assert not torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-3)
        theirs = PeftModel.from_pretrained(plain, run.model).eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs, expected)
        assert main.run(["export", "run", "merged", "--merged"]) == 0
        merged = AutoModelForCausalLM.from_pretrained("merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


def test_names_that_match_nothing(mixture: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_parameters=mlp\.experts\.up_proj: matches no parameter"):
        adapted(mixture, target_parameters=["mlp.experts.up_proj"])


def test_a_model_without_experts_is_refused(source: ModelSource) -> None:
    with pytest.raises(ConfigError, match=r"target_parameters=experts: this model has no experts whose weights"):
        adapted(Path(source.path), target_parameters="experts")


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "use_dora"),
     ({"init_lora_weights": "olora"}, "init_lora_weights")],
)  # fmt: skip
@versions.single_parameters
def test_what_does_not_work_on_single_parameters(changes: dict[str, Any], key: str) -> None:
    [fault] = find_faults(node("lora", "lora", target_parameters="experts", **changes), "lora")
    assert fault.key == f"lora.{key}"
    assert "does not work on single parameters" in fault.problem
