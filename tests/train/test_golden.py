"""The losses of a short run on the real model and rows: what a change of speed must not move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import prepared

from runner.tracking import metrics_log
from runner.train import worker

SHORT = ("data.max_length=128", "train.max_steps=4", "data.eval_rows=2", "train.sample_prompts=0", "tracking=offline")
LOSSES = {
    "quant=none": [4.70869, 4.50785, 4.19482, 3.85031],
    "quant=4bit": [4.90521, 4.67878, 4.56701, 4.08305],
}
"""Of the first four steps in float32; seen with torch 2.15 and transformers 5.23 on a CPU with AVX-512."""
WAYS = (
    "quant=none",
    "quant=none model.attention=sdpa train.memory=min",
    "quant=none train.memory=balanced train.micro_batch_size=1",
    "quant=4bit",
)


@pytest.mark.slow
@pytest.mark.parametrize("changes", WAYS)
def test_the_losses_are_what_they_were(changes: str, cache: Path, tmp_path: Path) -> None:
    rundir = prepared(tmp_path / "run", *SHORT, *changes.split())
    assert worker.work(rundir) == 0
    found = [record["train/loss"] for record in metrics_log.read(rundir) if "train/loss" in record]
    np.testing.assert_allclose(found, LOSSES[changes.split()[0]], atol=2e-4)
