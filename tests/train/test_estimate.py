"""A step that cannot be simulated: its memory is unknown, and no number is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, composed

from runner.cli import plan
from runner.errors import ConfigError
from runner.models.kernels import compilation, varlen_attention
from runner.train import build, estimate, inputs, probe, throughput
from runner.train.memory import usage
from runner.train.options import Options

EIGHT = (*TINY, "train.per_device_batch_size=8", "train.micro_batch_size=auto")
FREE = 2**40


@pytest.fixture(autouse=True)
def no_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose decoder layers are not found, on a device with much memory; no step was simulated before."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    monkeypatch.setattr(compilation, "layers_of", lambda _: [])
    monkeypatch.setattr(usage, "of_device", lambda *_: (FREE, FREE))


def made(*overrides: str) -> inputs.Inputs:
    return inputs.inputs(Options(composed(*overrides)))


def test_what_is_unknown_is_in_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = estimate.expect(made(*TINY))
    memory = expected.memory
    assert memory.activations is None
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.libraries
    assert "no list of decoder layers of one class" in expected.unknown
    assert not expected.fits
    estimate.check_fits(expected)
    monkeypatch.setattr(usage, "of_device", lambda *_: (memory.weights, memory.weights))
    with pytest.raises(ConfigError, match="needs at least"):
        estimate.check_fits(estimate.expect(made(*TINY)))


def test_plan_shows_why_the_memory_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    plan.show([("", composed(*TINY))])
    shown = " ".join(capsys.readouterr().out.split())
    assert "unknown: a step of this model cannot be simulated" in shown
    assert "activations and logits unknown" in shown
    assert "memory, GiB about" not in shown


@pytest.mark.parametrize(("devices", "rows"), [((), 1), (("cpu",), 8)])
def test_the_probe_decides_on_the_rows_where_it_can(devices: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DEVICES", devices)
    chosen = build.resolve_micro_batch_size(made(*EIGHT))
    assert chosen.settings.micro_batch_size == rows
    assert chosen.estimate is not None
    assert chosen.estimate.unknown


def test_a_small_model_on_a_gpu_waits_for_python(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(*EIGHT)
    expected = dataclasses.replace(estimate.expect(run), layers=30)
    on_gpu = dataclasses.replace(run, device=torch.device("cuda"))
    monkeypatch.setattr(throughput, "peak_flops", lambda *_, **__: 1e15)
    monkeypatch.setattr(estimate, "dtype_for", lambda *_: torch.bfloat16)
    micro_batches = run.total_steps * (run.batches.order.per_step // run.batches.per_micro_batch)
    launching = micro_batches * 30 * estimate.OPERATIONS_OF_LAYER * estimate.LAUNCH_S
    assert estimate.training_seconds(on_gpu, expected)[0] == pytest.approx(launching)
    assert estimate.training_seconds(run, expected)[0] < launching
    monkeypatch.setattr(throughput, "peak_flops", lambda *_, **__: 1.0)
    assert estimate.training_seconds(on_gpu, expected) == estimate.training_seconds(run, expected)


def test_the_buffer_of_cudnn_is_part_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = transformers.LlamaConfig(num_attention_heads=32, head_dim=128), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert varlen_attention.workspace_bytes(config, 4 * 8192, gpu) == 4 * 8192 * 32 * 128 * 4
    assert varlen_attention.workspace_bytes(config, 4 * 8192, torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert varlen_attention.workspace_bytes(config, 4 * 8192, gpu) == 0


def test_an_optimizer_that_does_not_take_the_trained_parameters_is_refused_by_the_plan() -> None:
    """VeRA trains vectors only: a run refused them, and the plan did not."""
    with pytest.raises(ConfigError, match="Muon needs matrices, but none is trainable"):
        plan.show([("", composed(*TINY, "lora=peft", "lora.method=vera", "optim=muon"))])
