"""The machine is sampled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.tracking.machine import gpu_handles
from runner.tracking.mirror.system_metrics import Sampler


def test_the_machine_is_sampled() -> None:
    sampler = Sampler(Path())
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(80_000_000)\nwhile True: pass"])
    try:
        time.sleep(0.3)
        sampler.sample(child.pid)
        time.sleep(0.5)
        found = sampler.sample(child.pid)
    finally:
        child.kill()
        child.wait()
    assert 80 < found["system/process_memory_megabytes"] < 200
    assert 20 < found["system/process_cpu_percentage"] < 150
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(found)
    assert "system/process_memory_megabytes" not in sampler.sample(child.pid), (
        "a process that is gone costs only itself"
    )


@pytest.mark.gpu
def test_only_our_gpus_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    if not list(gpu_handles()):
        pytest.skip("no GPU that NVML can see")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = Sampler(Path()).sample(os.getpid())
    assert {name for name in found if name.endswith("memory_usage_megabytes")} >= {
        "system/gpu_0_memory_usage_megabytes"
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not [name for name in Sampler(Path()).sample(os.getpid()) if "gpu" in name]
