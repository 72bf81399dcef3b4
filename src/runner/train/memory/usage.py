"""Memory of this process: current and peak usage, and how much the device has."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30
LIBRARY = re.compile(
    r"^[0-9a-f]+-.*\.so(?:\.\d+)*\n(?:.*\n)*?Rss: +(\d+) kB\n(?:.*\n)*?Anonymous: +(\d+) kB", re.MULTILINE
)
"""A mapping of a shared library in smaps: its resident and its anonymous kilobytes."""


def held_already(device: torch.device) -> int:
    """Bytes of device memory that this process uses now (CPU: without the pages of files, such as libraries)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if "RssAnon" in (known := _status()):
        return known["RssAnon"] + known.get("RssShmem", 0)
    import psutil

    return int(psutil.Process().memory_info().rss) - libraries_mapped()


def begin(device: torch.device) -> None:
    """Reset the peak memory of this process, so that data preparation or a run before it does not count.

    On a CPU it also makes glibc return freed memory to the system (0.25 GiB after a GGUF file was converted).
    """
    if device.type == "cuda":
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def of_device(device: torch.device, sharing: int = 1) -> tuple[int, int]:
    """(total, free) bytes of the device for one process.

    On a CPU: the memory of the machine, or the cgroup limit of the container or Slurm step if lower, divided by
    ``sharing``, the number of this run's processes on the machine.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, limit - used)
    return total // sharing, free // sharing


def metrics() -> dict[str, float]:
    """Peak memory so far in GiB: of the CUDA allocator, or resident memory of this process without CUDA."""
    if torch.cuda.is_available():
        return {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    return {"memory/peak_rss_gib": peak_of_process() / GIB}


def peak_of_process() -> int:
    """Peak resident memory in bytes, without ``libraries_mapped``."""
    return _peak.less_libraries(_high_water_mark())


class _Peak:
    """Caches the largest ``libraries_mapped`` so far, since the kernel may evict library pages.

    Reading it takes the kernel 40 ms: it is read again only when the resident pages of files (without /proc: the peak)
    have changed by more than 2 MiB.
    """

    of_files = libraries = 0

    def less_libraries(self, resident: int) -> int:
        of_files = _status().get("RssFile", resident)
        if abs(of_files - self.of_files) > 2 * 2**20:
            self.of_files, self.libraries = of_files, max(self.libraries, libraries_mapped())
        return resident - self.libraries


_peak = _Peak()


def _high_water_mark() -> int:
    """Peak resident bytes. On Linux from VmHWM: getrusage survives exec, so a child would report its parent's peak."""
    if "VmHWM" in (known := _status()):
        return known["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status() -> dict[str, int]:
    """Resident bytes of this process by kind, and their peak, from the kernel's own counters; empty without /proc."""
    with contextlib.suppress(OSError):
        found = re.findall(r"^(VmHWM|Rss\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return {name: int(kilobytes) * 1024 for name, kilobytes in found}
    return {}


def libraries_mapped() -> int:
    """Resident bytes of unmodified pages of shared libraries; 0 without /proc.

    Processes share these pages, and a forked process counts only the pages it has accessed itself. Without subtracting
    them, two runs of one configuration would report different peaks.
    """
    total = 0
    with contextlib.suppress(OSError):
        mappings = LIBRARY.findall(Path("/proc/self/smaps").read_text())
        total = sum(int(resident) - int(anonymous) for resident, anonymous in mappings)
    return total * 1024


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup of this process (v2, then v1); cached files count as free."""
    for root, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in (Path(root), *(Path(root) / path for path in _own_groups())):
            with contextlib.suppress(OSError, ValueError):
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = int(stat.get("inactive_file", 0))
                yield int((folder / limit).read_text()), int((folder / used).read_text()) - cached


def _own_groups() -> Iterator[Path]:
    """Paths of this process's cgroups and their parents, relative to the root of the hierarchy."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            path = Path(line.split(":", 2)[2].lstrip("/"))
            yield from (path, *path.parents[:-1])
