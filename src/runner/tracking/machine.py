"""The GPUs that this process may use (through NVML, without importing torch), and the user name."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any


def visible_gpus() -> list[str]:
    """The GPUs of this process, as written in CUDA_VISIBLE_DEVICES; does not initialise CUDA."""
    return [name for name, _ in _named_gpus()]


def has_cuda() -> bool:
    """Whether torch can use a GPU here, guessed without importing torch."""
    return bool(visible_gpus()) and not importlib.metadata.version("torch").endswith("+cpu")


def gpu_names() -> list[str]:
    """Product names of ``visible_gpus``: ``["NVIDIA A100-SXM4-80GB"]``."""
    names = []
    for handle in gpu_handles():
        import pynvml

        with contextlib.suppress(Exception):
            name = pynvml.nvmlDeviceGetName(handle)
            names.append(name.decode() if isinstance(name, bytes) else str(name))
    return names


def idle_gpus() -> list[str]:
    """The visible GPUs without a compute process; a GPU that does not report its processes counts as idle."""
    return [name for name, handle in _named_gpus() if not _is_busy(handle)]


def _is_busy(handle: Any) -> bool:
    import pynvml

    with contextlib.suppress(Exception):
        return bool(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return False


def gpu_handles(visible: str | None = None) -> Iterator[Any]:
    """NVML handles of the GPUs in ``visible`` (default: CUDA_VISIBLE_DEVICES), in that order; empty without NVML."""
    return (handle for _, handle in _named_gpus(visible))


def _named_gpus(visible: str | None = None) -> Iterator[tuple[str, Any]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception:  # no package, no driver, or no GPU
        return
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    for name in filter(None, (word.strip() for word in visible.split(","))):
        with contextlib.suppress(Exception):
            yield name, pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else _of_uuid(name, count)


def _of_uuid(name: str, count: int) -> Any:
    """The handle of a GPU by its UUID, of which CUDA takes a beginning, too (GPU-8932f937)."""
    import pynvml

    with contextlib.suppress(Exception):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(count)):
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        if (uuid.decode() if isinstance(uuid, bytes) else uuid).startswith(name):
            return handle
    raise LookupError(name)


def user() -> str:
    """Name of the current user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
