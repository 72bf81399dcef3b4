"""GPUs and cores are shared out."""

from __future__ import annotations

import os

import pytest
from fixtures.queued_sweeps import launcher

from runner.launch.local import accelerate, slots
from runner.tracking import machine


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


def test_a_run_of_several_processes_has_a_gpu_for_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1", "2", "3", "4"])
    monkeypatch.setattr(machine, "idle_gpus", lambda: ["1", "2", "3", "4"])
    assert [slot.gpus for slot in slots.share(None, threads=1, processes=2)] == [("1", "2"), ("3", "4")]
