"""What a rerun reports about its original, from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.mirrored_runs import finish, make_run
from safetensors.torch import save_file

from runner.report import record, reproduction
from runner.tracking.rundir import RunDir


def trained(outputs: Path, name: str, weight: float = 1.0) -> RunDir:
    rundir = finish(make_run(outputs, name))
    save_file({"weight": torch.full((2,), weight)}, rundir.model / "adapter_model.safetensors")
    rundir.update_manifest(weights_sha256=record.of_folder(rundir).manifest["weights_sha256"], rerun={"id": "0" * 32})
    return rundir


def outcome(original: RunDir, rerun: RunDir) -> dict[str, Any]:
    reproduction.print_after(record.of_folder(original), rerun, is_over=True)
    found: dict[str, Any] = rerun.read_manifest()["rerun"]
    assert found["id"] == "0" * 32
    return dict(found["outcome"])


def test_equal_numbers_and_weights_are_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = outcome(trained(tmp_path, "first"), trained(tmp_path, "again"))
    assert found == {"identical": True, "steps": 5, "first": None, "same_weights": True}
    said = capsys.readouterr().err
    assert "data        the same rows as the original (digest dddddddddddd)" in said
    assert "train/loss and all other compared metrics at 5 steps, bit for bit; the weights are identical" in said
    assert "compare" not in said.replace("compared", "")


def test_the_first_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = trained(tmp_path, "first"), trained(tmp_path, "again", weight=2.0)
    lines = [json.loads(line) for line in again.metrics.read_text().splitlines()]
    lines[2]["train/loss"] += 0.25
    again.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = outcome(first, again)
    assert (found["identical"], found["same_weights"]) == (False, False)
    assert found["first"][:2] == [3, "train/loss"]
    said = capsys.readouterr().err
    assert "not identical: first difference at step 3, train/loss was 0.3333333333333333 and is 0.5833" in said
    assert "the losses differ by at most 0.25" in said
    assert f"compare     python -m runner diff {first.path} {again.path}" in said


def test_equal_numbers_with_other_weights_are_not_identical(tmp_path: Path) -> None:
    found = outcome(trained(tmp_path, "first"), trained(tmp_path, "again", weight=2.0))
    assert found == {"identical": False, "steps": 5, "first": None, "same_weights": False}


def test_a_killed_original_has_no_final_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(tmp_path, "first", weight=2.0)
    first.write_state(status="killed")
    assert outcome(first, trained(tmp_path, "again"))["same_weights"] is None
    assert "the weights cannot be compared" in capsys.readouterr().err


def test_a_rerun_that_was_stopped_is_compared_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = trained(tmp_path, "first"), trained(tmp_path, "again")
    reproduction.print_after(record.of_folder(first), again, is_over=False)
    assert "when the rerun is completed" in capsys.readouterr().err
    assert "outcome" not in again.read_manifest()["rerun"]
