"""LoRA+: the groups of PEFT's own optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, option
from fixtures import versions
from peft.optimizers import create_loraplus_optimizer
from test_loop import trained

from runner.errors import ConfigError
from runner.models import architecture, pretrained
from runner.train.options import Options

RATE, RATIO = 1e-3, 16.0


def model_of(*overrides: str) -> tuple[Options, Any]:
    options = Options(composed(*TINY, f"optim.learning_rate={RATE}", f"optim.loraplus_lr_ratio={RATIO}", *overrides))
    source = architecture.resolve(options.model)
    return options, options.lora(pretrained.load(source, options.quant, "cpu"))


def groups_of(optimizer: torch.optim.Optimizer, key: str) -> dict[float, set[int]]:
    """Value of ``key`` → the ids of the parameters that have it."""
    found: dict[float, set[int]] = {}
    for group in optimizer.param_groups:
        if group["params"]:
            found.setdefault(group[key], set()).update(map(id, group["params"]))
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("lora.modules_to_save=[lm_head]",),
        ("lora.target_modules=[q_proj,embed_tokens]", "model.tie_word_embeddings=false"),
        ("lora=dora",),
        ("quant=4bit",),
    ],
    ids=" ".join,
)
@versions.peft_16
def test_the_groups_are_those_of_peft(overrides: tuple[str, ...], cache: Path):
    options, model = model_of(*overrides, "optim.weight_decay=0.1")
    ours = options.optim(options.parameter_groups(model))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1
    )
    assert groups_of(ours, "lr") == groups_of(theirs, "lr")
    if overrides != ("lora=dora",):  # PEFT lets the magnitudes of DoRA decay; vectors never do here
        assert groups_of(ours, "weight_decay") == groups_of(theirs, "weight_decay")
    assert ours.param_groups[0]["lr"] == RATE, "the one that is logged"


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "muon", "torch"])
def test_every_optimizer_moves_b_faster(name: str, tmp_path: Path, cache: Path):
    common = (*TINY, f"optim={name}", "train.max_steps=1", "optim.weight_decay=0", "train.max_grad_norm=null")

    def moved(*more: str) -> float:
        parts, _ = trained(tmp_path, *common, *more)
        return sum(float(p.detach().abs().sum()) for n, p in parts.model.named_parameters() if "lora_B" in n)

    assert moved("optim.loraplus_lr_ratio=16") == pytest.approx(16 * moved(), rel=1e-3)


def test_the_schedule_keeps_the_ratio(tmp_path: Path, cache: Path):
    parts, recorded = trained(tmp_path, *TINY, "train.max_steps=3", "optim.loraplus_lr_ratio=4")
    slow, fast = (group["lr"] for group in parts.optimizer.param_groups)
    assert fast == pytest.approx(4 * slow)
    assert recorded.of("train/learning_rate")[-1] == slow


@versions.peft_16
def test_a_ratio_without_lora_is_refused(cache: Path):
    with pytest.raises(ConfigError, match="no parameter is called lora_B"):
        composed(*TINY, "lora=none", "optim.loraplus_lr_ratio=16")
    with pytest.raises(ConfigError, match="no parameter is called lora_B"):
        composed(*TINY, "lora=peft", "lora.method=ia3", "optim.loraplus_lr_ratio=16")
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio=0\.5: must be a finite number >= 1"):
        option("optim", "adamw", loraplus_lr_ratio=0.5)
    options = Options(composed(*TINY, "lora=peft", "lora.method=randlora", "+lora.r=8", "optim.loraplus_lr_ratio=16"))
    model = options.lora(pretrained.empty(architecture.resolve(options.model), options.quant))
    with pytest.raises(ConfigError, match="no parameter is called lora_B"):
        options.parameter_groups(model)
