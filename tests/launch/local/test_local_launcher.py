"""launcher=local: what is refused, what ``plan`` shows, and where a single run trains."""

from __future__ import annotations

import os

import pytest
from fixtures.queued_sweeps import launcher

from runner.errors import LaunchError
from runner.tracking import machine
from runner.tracking.rundir import RunDir
from runner.train import worker


def test_no_more_runs_at_once_than_there_are_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1", "2", "3"])
    launcher(parallel=4).check()
    with pytest.raises(LaunchError, match=r"launcher\.parallel=5: .* show 4\n    → set it to 4 or less"):
        launcher(parallel=5).check()
    with pytest.raises(LaunchError, match=r"search\.at_once=6"):
        launcher(parallel=4).check(at_once=6)


def test_a_single_run_takes_an_idle_gpu_and_plan_shows_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(machine, "idle_gpus", lambda: ["1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    seen: list[tuple[str, str]] = []

    def work(_: object) -> int:
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]))
        return 0

    monkeypatch.setattr(worker, "work", work)
    assert launcher(threads=1).launch([RunDir("here")], None) == [0]
    assert seen == [("1", "PCI_BUS_ID")], "NVML's number, in NVML's order"
    assert launcher().plan(1).endswith("GPU 1 (of 2)")
    assert launcher(parallel=2).plan(2).endswith("GPU 1 | 0 (of 2)")
