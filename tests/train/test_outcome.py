"""How a run ended, in words that name the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import prepared
from fixtures.stopped_runs import SHORT, preempted_run, raising

from runner.errors import LESS_MEMORY
from runner.train import loop, outcome, worker

# Out of memory, out of space


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
)
def test_out_of_memory_has_its_remedy(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
):
    rundir = prepared(tmp_path / "run", *SHORT)
    monkeypatch.setattr(loop, "optimizer_step", raising(error))
    assert worker.work(rundir) == 1
    told = capfd.readouterr().err
    assert "error: out of memory" in told
    assert f"→ {LESS_MEMORY}" in told
    assert "Traceback" not in told
    assert rundir.read_state().reason.startswith("out of memory")


def test_memory_that_really_is_not_there():
    """An exbibyte: torch's own words for it are understood."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert str(outcome.explained(caught.value)).startswith("out of memory")


def test_the_time_between_two_attempts_does_not_count(tmp_path: Path, cache: Path):
    rundir = preempted_run(tmp_path / "run", *SHORT)
    first = rundir.read_state()
    rundir.write_state(started=first.started - 5 * 3600)
    assert worker.work(rundir) == 0
    state = rundir.read_state()
    assert 0 < first.seconds < state.seconds < 3600, "without the five hours"
    assert 0 < state.summary["training seconds"] < 3600
