"""The parts of a run, which the train loop works with."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import TINY, no_hooks
from test_loop import parts_of


def test_the_parts_fit_together(tmp_path: Path, cache: Path) -> None:
    run_inputs, parts = parts_of(tmp_path, *TINY, "train.max_steps=3", "train.per_device_batch_size=2")
    trained = {id(parameter) for parameter in parts.model.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in parts.optimizer.param_groups for parameter in group["params"]} == trained
    assert (parts.total_steps, parts.settings) == (3, run_inputs.settings)
    assert (parts.task, parts.seed) == (run_inputs.options.task, run_inputs.options.seed)
    first = parts.batches.step(0)
    for prefetched, batch in zip(parts.prefetcher.step(0), first, strict=True):
        assert torch.equal(prefetched["input_ids"], batch["input_ids"])
    assert parts.quote(first[0]) in run_inputs.tokenizer.decode(first[0]["input_ids"].flatten())
    assert parts.checkpoints.folder == tmp_path / "checkpoints"


def test_training_without_a_time_limit_is_never_late() -> None:
    assert not no_hooks().is_late()
