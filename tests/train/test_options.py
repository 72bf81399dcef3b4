"""The configuration as typed options: each bound once, and what identifies layers and the start of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed, node

from runner.config import pinned_weights
from runner.errors import ConfigError
from runner.train.options import Options


@pytest.fixture(scope="module")
def cfg(cache: Path) -> dict[str, Any]:
    return composed(*TINY)


def changed(cfg: dict[str, Any], group: str, **keys: Any) -> Options:
    return Options({**cfg, group: {**cfg[group], **keys}})


def test_an_option_is_bound_once_and_needs_no_other() -> None:
    options = Options({"quant": node("quant", "none"), "optim": node("optim", "adamw", weight_decay=0.25)})
    assert options.quant is options.quant
    assert (options.quant.name, options.weight_decay) == ("none", 0.25)
    with pytest.raises(KeyError):
        _ = options.task


def test_layers_and_start_depend_on_what_determines_them_alone(cfg: dict[str, Any]) -> None:
    plain = Options(cfg)
    assert changed(cfg, "train", max_steps=7).start == plain.start
    assert changed(cfg, "lora", r=4).layers != plain.layers
    seeded = Options({**cfg, "seed": 5})
    assert (seeded.layers == plain.layers, seeded.start == plain.start) == (True, False)
    here, there = (changed(cfg, "lora", start=f"{folder}@{'a' * 32}") for folder in ("/here", "/there"))
    assert here.layers == there.layers != plain.layers, "the same adapter in another folder"


def test_the_option_that_averages_the_weights_is_named(cfg: dict[str, Any]) -> None:
    assert Options(cfg).average == ""
    assert changed(cfg, "train", ema=0.9).average == "train.ema=0.9"
    assert Options({**cfg, "optim": node("optim", "schedule_free")}).average == "optim=schedule_free"


def test_an_adapter_that_is_gone_or_changed_is_refused(cfg: dict[str, Any], tmp_path: Path) -> None:
    Options(cfg).refuse_changed_start()
    start = pinned_weights.joined(tmp_path, "a" * 32)
    with pytest.raises(ConfigError, match=r"lora\.start=.*is missing, or has other weights"):
        changed(cfg, "lora", start=start).refuse_changed_start()
