"""A step is simulated once: not again by the next worker, but by other code, other shapes and after a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed

from runner.cli import plan
from runner.errors import ConfigError
from runner.models.kernels import compilation
from runner.tracking import provenance
from runner.train import estimate, inputs
from runner.train.memory import peak, usage
from runner.train.options import Options


@pytest.fixture(autouse=True)
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that were simulated, with an empty cache at the start."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    steps: list[Any] = []
    rehearsed = peak.rehearsed

    def counted(*arguments: Any, **step: Any) -> int:
        steps.append(step)
        return rehearsed(*arguments, **step)

    monkeypatch.setattr(peak, "rehearsed", counted)
    return steps


def activations(*overrides: str) -> int | None:
    return estimate.expect(inputs.inputs(Options(composed(*TINY, *overrides)))).memory.activations


def test_the_plan_simulates_for_the_run_and_a_run_for_the_others_of_a_sweep(
    simulated: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan.show([("", composed(*TINY))])
    assert len(simulated) == 1
    first = activations()
    assert activations("optim.learning_rate=1e-3", "train.max_steps=7", "lora.start=null") == first
    assert len(simulated) == 1


def test_what_changes_the_step_is_simulated(simulated: list[Any]) -> None:
    activations()
    changes = ["lora.r=2", "train.per_device_batch_size=4", "data.max_length=64", "train.memory=min", "quant=4bit"]
    for count, change in enumerate(changes, 2):
        activations(change)
        assert len(simulated) == count, change


def test_other_code_simulates_again(simulated: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = activations()
    monkeypatch.setattr(provenance, "code_digest", lambda: "edited")
    assert activations() == first
    assert len(simulated) == 2


def test_a_damaged_cache_is_not_used(simulated: list[Any], tmp_path: Path) -> None:
    first = activations()
    (file,) = (tmp_path / "rehearsals").iterdir()
    file.write_text("{")
    assert activations() == first
    assert activations() == first
    assert len(simulated) == 2


def test_a_run_that_does_not_fit_is_refused_from_the_cache_too(
    simulated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    activations()
    monkeypatch.setattr(usage, "of_device", lambda *_: (2**20, 2**20))
    with pytest.raises(ConfigError, match="but the device has"):
        estimate.check_fits(estimate.expect(inputs.inputs(Options(composed(*TINY)))))
    assert len(simulated) == 1


def test_a_step_that_cannot_be_simulated_is_tried_again(simulated: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(compilation, "layers_of", lambda _: [])
        assert activations() is None
    assert activations() is not None
    assert len(simulated) == 2
