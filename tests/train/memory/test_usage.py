"""Memory of this process, of this machine and of its GPUs."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.own_memory import CPU, nothing_from_others

from runner.train.memory import peak, usage


def test_memory_of_this_process_and_machine() -> None:
    held, peak = usage.held_already(CPU), usage.peak_of_process()
    block = torch.ones((peak - held) // 4 + 128 * 2**20)  # 512 MiB beyond the peak so far
    assert usage.held_already(CPU) - held > 0.9 * block.nbytes
    assert usage.peak_of_process() - peak > 200 * 2**20
    if not torch.cuda.is_available():
        so_far = usage.peak_of_process()
        assert usage.metrics()["memory/peak_rss_gib"] * usage.GIB >= so_far


def test_libraries_do_not_count_nor_what_a_process_has_made_itself() -> None:
    """A forked process holds few of the pages of libraries that its parent has touched, and counts the same."""
    read = "import runner.train.memory.usage as m, torch; print(m.libraries_mapped(), m._high_water_mark())"
    told = subprocess.run([sys.executable, "-c", read], check=True, capture_output=True, text=True).stdout
    libraries, peak = map(int, told.split())
    assert 100 * 2**20 < libraries < peak, "torch's alone"
    before, block = usage.libraries_mapped(), torch.ones(2**26)
    assert usage.libraries_mapped() - before < 0.1 * block.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_libraries_are_read_again_only_when_more_of_them_may_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[int] = []
    monkeypatch.setattr(usage, "_peak", usage._Peak())
    monkeypatch.setattr(usage, "libraries_mapped", lambda: readings.append(0) or 100)
    first = usage.peak_of_process()
    block = torch.ones(2**24)  # 64 MiB beside the files
    assert usage.peak_of_process() >= first
    assert len(readings) == 1
    (tmp_path / "file").write_bytes(bytes(block.nbytes // 4))
    with (tmp_path / "file").open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        usage.peak_of_process()
    assert len(readings) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_what_was_done_before_does_not_count() -> None:
    def take(values: int) -> None:
        torch.ones(values).sum()

    take(2**27)
    usage.begin(torch.device("cpu"))
    peak = usage.peak_of_process()
    take(2**26)
    assert 0.9 * 2**28 < usage.peak_of_process() - peak < 0.6 * 2**29


def test_memory_of_this_machine() -> None:
    total, free = usage.of_device(CPU)
    assert 0 < free < total
    assert usage.of_device(CPU, 4)[0] == total // 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_a_gpu() -> None:
    torch.cuda.reset_peak_memory_stats()
    block = torch.ones(2**20, device="cuda")
    metrics = usage.metrics()
    assert block.nbytes / usage.GIB <= metrics["memory/peak_allocated_gib"] <= metrics["memory/peak_reserved_gib"]
    total, free = usage.of_device(torch.device("cuda"))
    assert free < total


@pytest.mark.parametrize("is_initialized", [True, False])
def test_on_a_gpu_the_peak_of_a_run_before_does_not_count(
    is_initialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    usage.begin(torch.device("cuda", 1))
    assert reset == [torch.device("cuda", 1)] * is_initialized
