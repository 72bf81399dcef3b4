"""The step that is tried before the first: nothing is left of it, and what does not fit is cut instead of failing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, prepared

from runner.models.kernels import compilation
from runner.tasks import cross_entropy
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import build, inputs, probe, worker
from runner.train.options import Options

EIGHT = (*TINY, "train.max_steps=3", "train.per_device_batch_size=8", "train.micro_batch_size=auto")
LENGTH = 128
"""Tokens of a packed row there."""


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a CPU said in time that its memory is full."""
    monkeypatch.setattr(probe, "DEVICES", ("cpu",))


def worked(folder: Path, *overrides: str, code: int = 0) -> RunDir:
    rundir = prepared(folder, *EIGHT, *overrides)
    assert worker.work(rundir) == code
    return rundir


def losses(rundir: RunDir) -> list[float]:
    return [record["train/loss"] for record in metrics_log.read(rundir) if "train/loss" in record]


def room_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for so many rows and no more; returns how many were asked for, growing."""
    asked, real = [], cross_entropy.sums

    def sums(model: Any, batch: Any) -> Any:
        asked.append(batch["input_ids"].numel() // LENGTH)
        if asked[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch)

    monkeypatch.setattr(cross_entropy, "sums", sums)
    return asked


@pytest.mark.parametrize("accumulation", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_nothing_is_left_of_it(accumulation: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run, bit for bit: weights, optimizer, random numbers, data."""
    options = ("lora.lora_dropout=0.2", f"train.gradient_accumulation_steps={accumulation}")
    plain = worked(tmp_path / "plain", *options)
    assert "memory/probed_gib" not in plain.read_state().summary
    monkeypatch.setattr(probe, "DEVICES", ("cpu",))
    asked = room_for(8, monkeypatch)
    probed = worked(tmp_path / "probed", *options)
    assert asked[: int(accumulation)] == [8] * int(accumulation), "with the gradients of an earlier micro-batch there"
    assert probed.read_state().summary["memory/expected_gib"] > 0
    assert losses(probed) == losses(plain)
    assert probed.read_manifest()["weights_sha256"] == plain.read_manifest()["weights_sha256"]


def test_what_does_not_fit_is_cut(
    on_cpu: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = worked(tmp_path / "given", "train.micro_batch_size=2")
    capfd.readouterr()
    asked = room_for(2, monkeypatch)
    cut = worked(tmp_path / "cut")
    assert asked[:3] == [8, 4, 2]
    assert max(asked[3:]) == 2, "evaluation too"
    assert cut.read_manifest()["micro_batch_size"] == 2
    assert losses(cut) == losses(given)
    said = "".join(capfd.readouterr())
    for rows, smaller in ((8, 4), (4, 2)):
        assert f"{rows} rows at a time do not fit on cpu: trying {smaller}; the batch stays the same" in said


def test_a_run_whose_rows_are_known_tries_nothing(
    on_cpu: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = room_for(8, monkeypatch)
    rundir = prepared(tmp_path / "run", *EIGHT)
    rundir.update_manifest(micro_batch_size=4)
    assert worker.work(rundir) == 0
    assert max(asked) == 4


def test_where_not_even_one_row_fits_the_run_is_refused(
    on_cpu: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = room_for(0, monkeypatch)
    worked(tmp_path / "run", code=2)
    assert asked == [8, 4, 2, 1]
    assert f"a step of one row, {LENGTH} tokens long, does not fit on cpu" in "".join(capfd.readouterr())


@pytest.mark.parametrize(("factor", "is_said"), [(1.05, False), (1.2, True), (0.8, True)])
def test_a_peak_far_from_the_estimate_is_a_warning(
    factor: float, is_said: bool, on_cpu: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cfg = composed(*EIGHT)
    made = build.resolve_micro_batch_size(inputs.inputs(Options(cfg)))
    assert made.estimate is not None
    foretold = made.estimate.memory.total - made.estimate.memory.libraries
    monkeypatch.setattr(probe, "_peak_bytes", lambda _: int(factor * foretold))
    same, parts, metrics = probe.fit(made, build.parts(made, RunDir(tmp_path)))
    assert same is made
    assert parts.settings.micro_batch_size == 8
    assert metrics["memory/probed_gib"] == pytest.approx(factor * metrics["memory/expected_gib"], rel=1e-3)
    assert ("GiB estimated" in caplog.text) == is_said
    assert all(parameter.grad is None for parameter in parts.model.parameters())


@pytest.mark.slow
def test_layers_are_compiled_for_the_rows_that_fit_and_not_for_any_number(
    on_cpu: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compiled as when this number is tried first."""

    symbolic: list[tuple[int, bool]] = []  # rows of the try, and whether a graph has a size that is not fixed
    tried, real = [], cross_entropy.sums

    def sums(model: Any, batch: Any) -> Any:
        tried.append(batch["input_ids"].numel() // LENGTH)
        result = real(model, batch)
        if tried[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        symbolic.append((tried[-1], any(isinstance(value, torch.SymInt) for value in example_inputs)))
        return graph.forward

    def of_four_rows(most: int) -> list[tuple[int, bool]]:
        torch._dynamo.reset()
        made = build.resolve_micro_batch_size(
            inputs.inputs(Options(composed(*EIGHT, f"train.per_device_batch_size={most}")))
        )
        parts = build.parts(made, RunDir(tmp_path))
        for layer in compilation.decoder_layers(parts.model):
            layer.compile(backend=backend)
        symbolic.clear()
        probe.fit(made, parts)
        return [graph for graph in symbolic if graph[0] == 4]

    monkeypatch.setattr(cross_entropy, "sums", sums)
    expected = of_four_rows(4)
    found = of_four_rows(8)
    assert 8 in tried
    assert found[: len(expected)] == expected, "its later graphs are of the second micro-batch"


def test_the_heaviest_batch_is_one_that_no_step_exceeds(cache: Path) -> None:
    for packing in ("true", "false"):
        cfg = composed(*EIGHT, f"data.packing={packing}", "train.micro_batch_size=4")
        batches = inputs.inputs(Options(cfg)).batches
        heaviest = batches.heaviest()
        count = "trained" if packing == "true" else "tokens"
        assert heaviest[count] >= max(batch[count] for step in range(4) for batch in batches.step(step))
        assert heaviest["input_ids"].numel() <= batches.largest.tokens
