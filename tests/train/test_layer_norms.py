"""Norms of layers: against plain sums of squares, and the whole norm that is clipped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_loop import Recorded, parts_of, trained

from runner.train import loop

ON = (*TINY, "train.layer_norms=true", "optim.learning_rate=1e-2")


@pytest.mark.parametrize("lora", ["lora=lora", "lora=none", "lora=none lora.trainable_layers=1"])
def test_the_norms_are_those_of_the_parameters_of_each_layer(lora: str, tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *ON, *lora.split())
    parts.model.train()
    batches = parts.batches.step(0)
    totals = {kind: float(sum(batch[kind] for batch in batches)) for kind in ("trained", "weighted")}
    loop.accumulate_gradients(parts, batches, totals, Recorded().hooks())
    found = {name: float(value) for name, value in parts.layer_norms.measure(1).items()}
    expected: dict[str, float] = {}
    for name, parameter in parts.model.named_parameters():
        if parameter.requires_grad:
            owner = name.split("layers.")[1].split(".")[0] if "layers." in name else "other"
            for kind, tensor in (("grad_norm", parameter.grad), ("weight_norm", parameter)):
                key = f"layers/{owner}/{kind}"
                expected[key] = expected.get(key, 0.0) + float(tensor.detach().double().square().sum())
    assert found == pytest.approx({name: math.sqrt(value) for name, value in expected.items()}, rel=1e-5)
    whole = torch.nn.utils.clip_grad_norm_(parts.model.parameters(), math.inf)
    together = math.sqrt(sum(value**2 for name, value in found.items() if name.endswith("grad_norm")))
    assert together == pytest.approx(float(whole), rel=1e-5)


def test_they_are_logged_with_the_other_metrics_and_change_nothing(tmp_path: Path, cache: Path):
    options = ("train.max_steps=5", "train.logging_steps=2", "train.max_grad_norm=0.01")
    _, plain = trained(tmp_path / "plain", *TINY, "optim.learning_rate=1e-2", *options)
    _, recorded = trained(tmp_path / "norms", *ON, *options)
    of_training = [(step, metrics) for step, metrics in recorded.records if "train/loss" in metrics]
    assert [step for step, _ in of_training] == [2, 4, 5]
    for _, metrics in of_training:
        layers = [value for name, value in metrics.items() if name.startswith("layers/") and "grad" in name]
        assert len(layers) == 2
        assert math.sqrt(sum(value**2 for value in layers)) == pytest.approx(metrics["train/grad_norm"], rel=1e-5)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert recorded.of(name) == plain.of(name), name
    assert not any(name.startswith("layers/") for _, metrics in plain.records for name in metrics)
