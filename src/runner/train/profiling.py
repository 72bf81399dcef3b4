"""Profiles of some steps: ``train.profile``. Rank 0 writes them into the folder ``profile`` of the run.

- ``trace.json.gz``: every operation, for Perfetto (https://ui.perfetto.dev) or chrome://tracing.
- ``operations.txt``: the time of each operation. ``summary.txt``: the same on one page.
- ``memory.pickle``: what is allocated where on a CUDA device, for https://docs.pytorch.org/memory_viz.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runner.config.schema import TrainSettings
from runner.errors import ConfigError, Fault
from runner.files import write_atomic
from runner.train.throughput import Meter

TRACE, OPERATIONS, SUMMARY, MEMORY = "trace.json.gz", "operations.txt", "summary.txt", "memory.pickle"
ROWS, TOP = 60, 12
"""Operations in ``OPERATIONS`` and in ``SUMMARY``."""
MOST_EVENTS = 1_000_000
"""Allocations in ``MEMORY``."""
log = logging.getLogger("runner")


@dataclass
class Profile:
    """Records the steps ``first`` to ``last``; a profiled step does not count in the speed of the run."""

    folder: Path
    device: torch.device
    meter: Meter
    steps: range
    """The steps to record, counted from 1; empty: none."""
    has_memory: bool
    _profiler: Any = field(default=None, init=False)
    _first: int = field(default=0, init=False)
    _began: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, settings: TrainSettings, folder: Path, device: torch.device, meter: Meter, *, leads: bool) -> Profile:
        first, count = settings.profile_start, settings.profile or 0
        return cls(folder, device, meter, range(first, first + count if leads else first), settings.profile_memory)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """For the step ``number``: start before the first one, and write after the last one."""
        if number in self.steps and self._profiler is None:
            self._start(number)
        yield
        if self._profiler is not None and number + 1 not in self.steps:
            self._write(number)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For the whole training: what is recorded when it ends early is dropped."""
        try:
            yield
        finally:
            if self._profiler is not None:
                self._stop()

    def _start(self, number: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints what it does, and that there is no GPU
        on_gpu = self.device.type == "cuda"
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        if self.has_memory:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self._profiler.start()
        self._first, self._began, self.meter.is_counting = number, time.perf_counter(), False

    def _stop(self) -> float:
        """Stop recording; returns the seconds since its start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._began
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self.has_memory:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.meter.is_counting = True
        return seconds

    def _write(self, last: int) -> None:
        profiler = self._profiler
        self.folder.mkdir(exist_ok=True)
        if self.has_memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / MEMORY))
        seconds = self._stop()
        profiler.export_chrome_trace(str(self.folder / TRACE))
        averages, key = profiler.key_averages(), _time_key(self.device)
        write_atomic(self.folder / OPERATIONS, averages.table(sort_by=key, row_limit=ROWS))
        write_atomic(self.folder / SUMMARY, _summary(averages, key, self._first, last, seconds))
        log.info(f"profile of the steps {self._first} to {last}: {self.folder / SUMMARY}")
        self.meter.pause()


def check_device(settings: TrainSettings, device: torch.device) -> None:
    """Refuse ``train.profile_memory`` without a CUDA device.

    Raises:
        ConfigError: the device is another one.
    """
    if settings.profile_memory and device.type != "cuda":
        problem = f"records the memory of CUDA devices, and the run is on {device}"
        raise ConfigError(Fault("train.profile_memory", problem, "set it to false", True))


def _time_key(device: torch.device) -> str:
    """The time of an operation itself, without those inside it, on the device that computes."""
    return "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"


def _summary(averages: Any, key: str, first: int, last: int, seconds: float) -> str:
    """Time of the steps, how much of it is computed, and the operations that take most."""
    total = sum(getattr(event, key) for event in averages) / 1e6 or 1.0
    where = "operations on the CPU" if key.startswith("self_cpu") else "kernels on the GPU"
    largest = sorted(averages, key=lambda event: -getattr(event, key))[:TOP]
    count = last - first + 1
    lines = [
        f"steps {first} to {last}: {seconds / count:.4f} s for each, recording included",
        f"{min(total / seconds, 1):.0%} of the time in {where}; the rest is Python, waiting for data, and evaluations",
        "",
        "  share   seconds   calls  operation",
    ]
    for event in largest:
        own = getattr(event, key) / 1e6
        lines.append(f"{own / total:7.1%} {own:9.4f} {event.count:7d}  {event.key}")
    return "\n".join([*lines, ""])
