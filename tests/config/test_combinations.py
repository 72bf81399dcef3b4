"""Keys of ``train`` that other options keep from taking effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, composed

from runner.errors import ConfigError

NOISE = "train.neftune_noise_alpha=5"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (f"{NOISE} task=dpo data=chitchat_pairs", "task=dpo compares the model with its own start"),
        (f"{NOISE} task=distill task.teacher=runner/tiny task.lmbda=0.5 task.top_k=null task.max_completion_length=8 "
         "task.sampling_temperature=1 data.packing=false", "task=distill makes the batches of a step itself"),
        (f"{NOISE} compile=default", "noise differs at each step"),
    ],
)  # fmt: skip
def test_noise_that_could_not_take_effect_is_refused(words: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        composed(*TINY, *words.split())


def test_a_callback_named_twice_is_refused(tmp_path: Path):
    file = tmp_path / "watch.py"
    file.write_text("def watch(event):\n    pass\n")
    assert composed(*TINY, f"train.callbacks=[{file}:watch]")
    with pytest.raises(ConfigError, match=r"names .*watch\.py:watch twice"):
        composed(*TINY, f"train.callbacks=[{file}:watch,{file}:watch]")


@pytest.mark.parametrize("option", ["regional", "default"])
def test_compiled_layers_cannot_move_their_inputs(option: str):
    assert composed(*TINY, "train.memory=offload", "compile=none")
    with pytest.raises(ConfigError, match="compile: compiled layers cannot move their inputs"):
        composed(*TINY, "train.memory=offload", f"compile={option}")


def test_directions_of_the_data_need_the_whole_model():
    with pytest.raises(ConfigError, match=r"lora\.init_lora_weights=eva: needs passes through the whole model"):
        composed(*TINY, "lora.init_lora_weights=eva", "parallel=fsdp", "launcher=accelerate", "launcher.processes=2")


def test_tf32_needs_products_in_float32():
    assert composed(*TINY, "train.tf32=true", "model.dtype=float32")
    with pytest.raises(ConfigError, match=r"train\.tf32=true: has no effect with model\.dtype=auto"):
        composed(*TINY, "train.tf32=true")
