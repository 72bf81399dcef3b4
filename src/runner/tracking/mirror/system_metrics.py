"""System metrics of a run (CPU, memory, disk, its GPUs), sampled by the upload process.

MLflow's own monitor stops at its first failing call and samples every GPU of the node. This sampler skips what fails
and samples the GPUs of the run only. The metric names are MLflow's, so that its charts show them.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import psutil

from runner.tracking.machine import gpu_handles


class Sampler:
    """Samples the machine, the disk of ``folder``, and a process with its children.

    Each instance keeps its own previous sample (psutil's ``cpu_percent`` has one per process): so a process that
    uploads several runs has one sampler per run.
    """

    def __init__(self, folder: Path, gpus: str | None = None) -> None:
        """``gpus``: the GPUs of the run in the format of CUDA_VISIBLE_DEVICES; None: this process's own value."""
        self._folder = folder
        self._gpus = list(gpu_handles(gpus))
        self._cpu_seconds: tuple[int, float, float] | None = None  # (pid, CPU seconds, time of the sample)
        self._machine_seconds = _machine_seconds()

    def sample(self, pid: int) -> dict[str, float]:
        """``system/…`` metrics in percent, MB (1e6 bytes) and watts; metrics that cannot be read are missing."""
        values: dict[str, float] = {}
        for measure in (self._machine, lambda: self._process(pid), self._gpu):
            # A failing sensor, or a process that ends meanwhile, affects its own metrics only.
            with contextlib.suppress(Exception):
                values.update(measure())
        return {f"system/{name}": round(value, 1) for name, value in values.items()}

    def _machine(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        (busy_before, total_before), (busy, total) = self._machine_seconds, _machine_seconds()
        self._machine_seconds = busy, total
        return {
            "cpu_utilization_percentage": (busy - busy_before) / max(total - total_before, 1e-9) * 100,
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }

    def _process(self, pid: int) -> dict[str, float]:
        """Memory and CPU of the worker and its children; 100 % is one busy core."""
        resident, seconds, now = 0, 0.0, time.monotonic()
        worker = psutil.Process(pid)
        for process in [worker, *worker.children(recursive=True)]:
            if process.pid == os.getpid():
                continue
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
                resident += process.memory_info().rss
        before, self._cpu_seconds = self._cpu_seconds, (pid, seconds, now)
        values = {"process_memory_megabytes": resident / 1e6}
        if before and before[0] == pid and now > before[2]:
            values["process_cpu_percentage"] = max(0.0, (seconds - before[1]) / (now - before[2]) * 100)
        return values

    def _gpu(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for number, handle in enumerate(self._gpus):
            for measure in (_gpu_memory, _gpu_utilization, _gpu_power):
                with contextlib.suppress(Exception):  # for example: a MIG slice reports no utilization
                    values.update({f"gpu_{number}_{name}": value for name, value in measure(handle).items()})
        return values


def _machine_seconds() -> tuple[float, float]:
    """CPU seconds of all cores since boot: (busy, total)."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # counted in user and nice
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _gpu_memory(handle: Any) -> dict[str, float]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_megabytes": memory.used / 1e6,
        "memory_usage_percentage": memory.used / memory.total * 100,
    }


def _gpu_utilization(handle: Any) -> dict[str, float]:
    import pynvml

    return {"utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def _gpu_power(handle: Any) -> dict[str, float]:
    import pynvml

    used, limit = pynvml.nvmlDeviceGetPowerUsage(handle), pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
    return {"power_usage_watts": used / 1000, "power_usage_percentage": used / limit * 100}
