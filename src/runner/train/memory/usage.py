"""What this process takes of its device's memory, now and at its peak, and what there is."""

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
LIBRARY = re.compile(r"\.so(\.\d+)*$")
"""The end of a library's path."""


def held_already(device: torch.device) -> int:
    """Bytes that this process takes of the device's memory now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    import psutil

    return int(psutil.Process().memory_info().rss) - libraries_mapped()


def begin() -> None:
    """Let the peak begin here, without what is left of what was done before: preparing data, once for many runs.

    glibc gives back what it keeps of freed memory, as 0.25 GiB after a GGUF file was converted.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def of_device(device: torch.device, sharing: int = 1) -> tuple[int, int]:
    """(total, free) bytes of the device for one process.

    For a CPU those of the machine, or of the container's or Slurm step's limit where that is less, divided by the
    processes of this run that share it.
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
    """The peak so far in GiB: of CUDA's allocator, or of this process's own memory where there is no CUDA."""
    if torch.cuda.is_available():
        return {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    return {"memory/peak_rss_gib": peak_of_process() / GIB}


def peak_of_process() -> int:
    """Bytes of resident memory at their peak, without ``libraries_mapped``."""
    return _peak.less_libraries(_high_water_mark())


class _Peak:
    """The last peak, and the most of libraries that was mapped: the kernel may have taken some away since.

    They are looked for only when the peak is another one; what is mapped later counts from the next peak on.
    """

    resident = libraries = 0

    def less_libraries(self, resident: int) -> int:
        if resident != self.resident:
            self.resident, self.libraries = resident, max(self.libraries, libraries_mapped())
        return self.resident - self.libraries


_peak = _Peak()


def _high_water_mark() -> int:
    """Bytes. On Linux getrusage survives exec, so that a child would report its parent's: VmHWM does not."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def libraries_mapped() -> int:
    """Bytes of the files of libraries that are in this process's resident memory as they are on the disk.

    Processes share them, and one that was forked has only those that it has touched itself: two runs of one
    configuration would differ by them. 0 where there is no /proc.
    """
    total, is_library, resident = 0, False, 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *words = line.split()
            if "-" in name:  # a mapping begins: addresses, permissions, offset, device, inode, file
                is_library = LIBRARY.search(line) is not None
            elif is_library and name == "Rss:":
                resident = int(words[0])
            elif is_library and name == "Anonymous:":
                total += resident - int(words[0])
    return total * 1024


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each group of this process (cgroup 2, then 1); files that are cached are free."""
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
    """The groups of this process, each with those above it, below the root of their hierarchy."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            path = Path(line.split(":", 2)[2].lstrip("/"))
            yield from (path, *path.parents[:-1])
