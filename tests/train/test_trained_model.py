"""The model of a run folder: base and adapter, or why there is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, node
from fixtures.language_models import FAMILIES, build
from peft import LoraConfig, get_peft_model

from runner.errors import ConfigError
from runner.models import architecture, pretrained
from runner.models.quantization import none
from runner.tracking.rundir import RunDir
from runner.train import trained_model
from runner.train.options import Options
from runner.train.trained_model import Trained

IDS = torch.arange(3, 9)[None]


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run folder with the adapter of a tiny model; nothing is trained for it."""
    cfg, rundir = composed(*TINY), RunDir(tmp_path_factory.mktemp("run"))
    base = pretrained.load(architecture.resolve(Options(cfg).model), none.none(), "cpu")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(rundir.model)
    return Trained(rundir, cfg)


def test_the_adapter_is_on_its_base_and_can_be_disabled(trained: Trained) -> None:
    assert (trained.is_adapter, trained.is_chat, trained.scores, trained.quant.plain) == (True, True, False, True)
    model, base = trained_model.load(trained, "cpu"), trained_model.load_base(trained, "cpu")
    assert not model.training
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=IDS).logits, base(input_ids=IDS).logits, atol=1e-3)
        with trained_model.without_adapter(model) as without:
            torch.testing.assert_close(without(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_an_adapter_that_is_missing_or_does_not_fit_is_refused(trained: Trained, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(trained.rundir.path, copy.path)
    other = {**trained.cfg, "model": {**trained.cfg["model"], "hidden_size": 32}}
    with pytest.raises(ConfigError, match=r"does not fit the base model.*\n    → set it to the base model that"):
        trained_model.load(Trained(copy, other), "cpu")
    (copy.model / trained_model.ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors does not exist"):
        trained_model.load(Trained(copy, trained.cfg), "cpu")


def test_a_base_that_is_gone_may_have_moved(trained: Trained, tmp_path: Path) -> None:
    gone = {**trained.cfg, "model": node("model", "local", path=str(tmp_path / "gone"), dtype="float32")}
    with pytest.raises(ConfigError, match=r"if the base model of this run has moved, add model\.path=FOLDER"):
        _ = Trained(trained.rundir, gone).base
    moved = shutil.copytree(trained.base.path, tmp_path / "here")
    assert Trained(trained.rundir, gone, str(moved)).base.path == str(moved)


@pytest.mark.parametrize(("bias", "is_inside"), [("none", True), ("all", False)])
def test_trained_biases_stay_where_the_adapter_is_disabled(bias: Any, is_inside: bool) -> None:
    model = build(FAMILIES["llama"])
    assert not trained_model.has_base_inside(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    assert trained_model.has_base_inside(adapted) is is_inside


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("completed", "its folder model/ was deleted: train the run again"),
        ("failed", "see the reason with python -m runner logs .*retry=true"),
        ("preempted", "continue it with python -m runner .*resume="),
    ],
)
def test_a_run_without_a_model_is_refused(tmp_path: Path, status: str, remedy: str) -> None:
    rundir = RunDir(tmp_path / "run")
    rundir.write_state(status=status, step=3, total_steps=9)
    rundir.update_manifest(name="run")
    with pytest.raises(ConfigError, match=rf"has no model yet: it is {status} \(step 3/9\)\n    → {remedy}"):
        trained_model.refuse_without_model(rundir)
    rundir.model.mkdir()
    (rundir.model / "config.json").write_text("{}")
    trained_model.refuse_without_model(rundir)
