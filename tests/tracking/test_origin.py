"""The chain of runs that a run came from, and its own copy of the adapter that it continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.config import pinned_weights
from runner.errors import DamagedError
from runner.tracking import origin
from runner.tracking.rundir import RunDir


def run_in(folder: Path, id: str, **manifest: object) -> Path:
    folder.mkdir(parents=True)
    RunDir(folder).update_manifest(name=folder.name, id=id * 32, **manifest)
    return folder


def adapter_in(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    (folder / pinned_weights.ADAPTER).write_text("{}")
    save_file({"lora_A": torch.full((2, 2), value)}, folder / pinned_weights.WEIGHTS)
    return folder


def test_the_chain_begins_with_the_nearest_run(tmp_path: Path) -> None:
    sft = run_in(tmp_path / "sft", "1")
    dpo = run_in(tmp_path / "dpo", "2", came_from=origin.entry("lora.start", sft))
    known = {origin.FIELD: origin.entry("lora.start", dpo)}
    assert [each["where"] for each in known[origin.FIELD]] == [str(dpo), str(sft)]
    assert origin.chain(known) == "dpo (22222222) ← sft (11111111)"
    assert origin.nearest(known) == "2" * 32
    RunDir(dpo).update_manifest(mlflow={"run_id": "3" * 32})
    assert origin.nearest({origin.FIELD: origin.entry("lora.start", dpo)}) == "3" * 32
    assert (origin.chain({}), origin.nearest({}), origin.teacher({})) == ("", None, "")
    (plain,) = origin.entry("lora.start", tmp_path / "adapter")
    assert (plain["where"], plain["id"]) == (str(tmp_path / "adapter"), None)


def test_a_model_folder_names_its_run(tmp_path: Path) -> None:
    run, exported = run_in(tmp_path / "sft", "1"), tmp_path / "exported"
    (run / "model").mkdir()
    exported.mkdir()
    cfg = {"model": {"path": str(exported)}}
    assert origin.came_from(cfg) == origin.came_from({"model": {}}) == []
    origin.note(exported, run)
    assert origin.came_from(cfg) == origin.came_from({"model": {"path": str(run / "model")}})
    assert origin.chain({origin.FIELD: origin.came_from(cfg)}) == "sft (11111111)"
    (exported / origin.EXPORTED).write_text("{")
    with pytest.raises(DamagedError, match="export the model again"):
        origin.came_from(cfg)


def test_a_run_keeps_the_adapter_that_it_starts_from(tmp_path: Path) -> None:
    adapter, rundir = adapter_in(tmp_path / "adapter", 1.0), RunDir(run_in(tmp_path / "run", "1"))
    digest = origin.digest_of(adapter)
    assert digest is not None
    cfg = {"seed": 0, "lora": {"start": pinned_weights.joined(adapter, digest)}}
    assert origin.started(cfg, rundir) == cfg
    origin.keep_start(cfg, rundir)
    origin.keep_start(cfg, rundir)  # an interrupted preparation is repeated
    own = origin.started(cfg, rundir)["lora"]["start"]
    assert own == pinned_weights.joined(rundir.start, digest)
    (adapter / pinned_weights.WEIGHTS).unlink()
    assert origin.is_there(own)
    assert not origin.is_there(cfg["lora"]["start"])
    adapter_in(tmp_path / "other", 2.0)
    assert not origin.is_there(pinned_weights.joined(tmp_path / "other", digest))
