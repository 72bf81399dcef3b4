"""A step cut into smaller pieces is the same step; how small they must be is found out from the memory that is free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, composed, prepared

from runner.data.batches import Batches
from runner.data.packing import Rows, pack
from runner.errors import ConfigError
from runner.tracking import manifest, metrics_log
from runner.train import build, estimate, inputs, worker
from runner.train.memory import footprint, usage
from runner.train.options import Options

WIDE = ("model.hidden_size=256", "model.intermediate_size=512")
"""Where the results of products are worth keeping."""
GENERATOR = np.random.default_rng(0)
LENGTHS = GENERATOR.integers(2, 30, 50)
OFFSETS = np.cumsum([0, *LENGTHS])
IDS = np.arange(OFFSETS[-1], dtype=np.int32)
LABELS = np.where(GENERATOR.random(OFFSETS[-1]) < 0.5, IDS, -100).astype(np.int32)


def batches(*, packing: bool, **changes: Any) -> Batches:
    rows = Rows(IDS, LABELS, OFFSETS, pack(LENGTHS, 32))
    shape = {"max_length": 32, "rows_per_batch": 6, "accumulation": 2, "seed": 0, "shuffle": True, "pad_id": 0}
    return Batches(rows, packing=packing, **{**shape, **changes})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_step_that_is_cut_has_the_same_rows(packing: bool, rows: int) -> None:
    whole = batches(packing=packing)
    cut = whole.cut_into(rows)
    for step in range(3):
        parts = cut.step(step)
        assert len(parts) == 12 // rows
        assert sum(part["tokens"] for part in parts) == sum(part["tokens"] for part in whole.step(step))
        assert learnt(parts) == learnt(whole.step(step))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_keeps_its_rows(rank: int) -> None:
    whole = batches(packing=True, rank=rank, world=2)
    assert learnt(whole.cut_into(2).step(1)) == learnt(whole.step(1))


def learnt(parts: list[dict[str, Any]]) -> set[int]:
    return {int(label) for part in parts for label in part["labels"].flatten() if label != -100}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("end_to_end", [True, False])
def test_no_batch_is_larger_than_the_largest(packing: bool, end_to_end: bool) -> None:
    made = batches(packing=packing)
    made = made.laid_end_to_end() if end_to_end else made
    every = [batch for step in range(10) for batch in made.step(step)]
    assert max(batch["input_ids"].numel() for batch in every) <= made.largest.tokens
    assert max(batch["trained"] for batch in every) <= made.largest.trained


def test_as_many_rows_as_fit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for two rows, and not for four."""
    cfg = composed(*TINY, "train.per_device_batch_size=8", "train.micro_batch_size=auto")
    monkeypatch.setattr(usage, "held_already", lambda _: 0)
    monkeypatch.setattr(footprint, "allocator_waste", lambda *_: 0)
    monkeypatch.setattr(usage, "of_device", lambda *_: (2**40, 2**40))
    plenty = build.resolve_micro_batch_size(inputs.inputs(Options(cfg)))
    assert plenty.settings.micro_batch_size == 8
    sizes = {rows: estimate.expect(inputs.compute_at_once(plenty, rows)).memory.total for rows in (2, 4)}
    assert sizes[2] < sizes[4]
    monkeypatch.setattr(usage, "of_device", lambda *_: (2**40, int(sizes[2] / footprint.ROOM) + 1))
    tight = build.resolve_micro_batch_size(inputs.inputs(Options(cfg)))
    assert (tight.settings.micro_batch_size, tight.batches.rows_per_batch, len(tight.batches.step(0))) == (2, 2, 4)
    assert tight.total_steps == plenty.total_steps
    monkeypatch.setattr(usage, "of_device", lambda *_: (2**40, 1))
    assert build.resolve_micro_batch_size(inputs.inputs(Options(cfg))).settings.micro_batch_size == 1, (
        "and the run is warned about, or refused, where it loads"
    )


def test_the_ranks_agree_on_what_fits_all(cache: Path) -> None:
    cfg = composed(*TINY, "train.per_device_batch_size=8", "train.micro_batch_size=auto")
    other: Any = SimpleNamespace(
        rank=0, world=2, gather=lambda mine: [mine, 2] if isinstance(mine, int) else [mine, None]
    )
    assert build.resolve_micro_batch_size(inputs.inputs(Options(cfg)), other).settings.micro_batch_size == 2


def test_a_run_goes_on_with_the_rows_that_it_began_with(cache: Path, tmp_path: Path) -> None:
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=2", "train.micro_batch_size=auto")
    assert worker.work(rundir) == 0
    assert rundir.read_manifest()["micro_batch_size"] == 2
    rundir.update_manifest(micro_batch_size=1)
    assert manifest.pinned(manifest.read_config(rundir), rundir)["train"]["micro_batch_size"] == 1


def test_the_pieces_train_what_the_whole_trains(cache: Path, tmp_path: Path) -> None:
    options = (*TINY, "train.max_steps=4", "train.per_device_batch_size=4")
    found = []
    for pieces in ("null", "1"):
        rundir = prepared(tmp_path / pieces, *options, f"train.micro_batch_size={pieces}")
        assert worker.work(rundir) == 0
        found.append([record["train/loss"] for record in metrics_log.read(rundir) if "train/loss" in record])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_pieces_of_unequal_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide") as refused:
        composed("train.micro_batch_size=4", "train.per_device_batch_size=6")
    assert "1, 2, 3, 6" in str(refused.value)


def test_what_others_call_it_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"train\.memory=min"):
        composed("+train.gradient_checkpointing=true")


@pytest.mark.parametrize("kept", ["balanced", "min"])
@pytest.mark.parametrize("adapter", ["lora=lora", "lora=none"])
def test_less_memory_changes_no_number(kept: str, adapter: str, cache: Path, tmp_path: Path) -> None:
    weights = []
    for memory_kept in ("speed", kept):
        options = (*TINY, *WIDE, "train.max_steps=3", adapter, f"train.memory={memory_kept}")
        rundir = prepared(tmp_path / memory_kept, *options)
        assert worker.work(rundir) == 0
        weights.append(rundir.read_manifest()["weights_sha256"])
    assert weights[0] == weights[1]
