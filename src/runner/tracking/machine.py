"""Samples of the machine that a run trains on: CPU, memory, disk, and those GPUs that are ours.

MLflow's own monitor stops for good at its first failing call and shows every GPU of the node; this one skips what
fails and looks at ``CUDA_VISIBLE_DEVICES`` only. The names are MLflow's, so that its charts find them.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; found without CUDA, which stays untouched."""
    return [name for name, _ in _named_gpus()]


def has_cuda() -> bool:
    """Whether torch computes on a GPU here, as far as that can be known without importing it."""
    return bool(visible_gpus()) and not importlib.metadata.version("torch").endswith("+cpu")


def gpu_names() -> list[str]:
    """What those of ``visible_gpus`` are called: ``["NVIDIA A100-SXM4-80GB"]``."""
    found = []
    for handle in gpu_handles():
        import pynvml

        with contextlib.suppress(Exception):
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(name.decode() if isinstance(name, bytes) else str(name))
    return found


def idle_gpus() -> list[str]:
    """Those of ``visible_gpus`` that nobody computes on; one that cannot tell counts as idle."""
    return [name for name, handle in _named_gpus() if not _is_busy(handle)]


def _is_busy(handle: Any) -> bool:
    import pynvml

    with contextlib.suppress(Exception):
        return bool(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return False


def gpu_handles(given: str | None = None) -> Iterator[Any]:
    """NVML's handles of those GPUs, in the order of CUDA_VISIBLE_DEVICES; none without NVML."""
    return (handle for _, handle in _named_gpus(given))


def _named_gpus(given: str | None = None) -> Iterator[tuple[str, Any]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception:  # no package, no driver, no GPU: nothing to sample
        return
    everything = ",".join(map(str, range(count)))
    visible = given if given is not None else os.environ.get("CUDA_VISIBLE_DEVICES", everything)
    for name in filter(None, (word.strip() for word in visible.split(","))):
        with contextlib.suppress(Exception):
            find = pynvml.nvmlDeviceGetHandleByUUID
            yield name, pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else find(name)


def user() -> str:
    """Who runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
