"""GPUs and cores are shared out."""

from __future__ import annotations

import os

import pytest
from fixtures.queued_sweeps import launcher

from runner.errors import LaunchError
from runner.launch.local import accelerate, slots
from runner.tracking import machine
from runner.tracking.rundir import RunDir
from runner.train import worker


def test_gpus_are_shared_out_and_cores_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launcher(parallel=1).slots()[0].threads == len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [slot.threads for slot in launcher(parallel=3).slots()] == [2, 2, 2]
    assert [slot.threads for slot in launcher(parallel=3, threads=5).slots()] == [5, 5, 5]
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert accelerate.accelerate(processes=1000).plan(1).endswith(", 1 threads each")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(machine, "idle_gpus", lambda: ["1", "2", "3"])
    assert [slot.gpus for slot in launcher().slots()] == [("1",), ("2",), ("3",)]
    assert [slot.gpus for slot in launcher(parallel=4).slots()] == [("1",), ("2",), ("3",), ("0",)]
    launcher(parallel=4).check()
    with pytest.raises(LaunchError, match="show 4"):
        launcher(parallel=5).check()


def test_a_run_of_several_processes_has_a_gpu_for_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1", "2", "3", "4"])
    monkeypatch.setattr(machine, "idle_gpus", lambda: ["1", "2", "3", "4"])
    assert [slot.gpus for slot in slots.share(None, threads=1, processes=2)] == [("1", "2"), ("3", "4")]


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
