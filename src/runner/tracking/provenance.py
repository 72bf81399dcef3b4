"""Hashes and versions for reproducing a run: source code, packages and lock file, machine, weights.

Two runs that agree in all of these, in configuration and in data compute the same result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner import PACKAGE
from runner.config.code_files import digest_of
from runner.files import cache_dir, write_atomic

PACKAGES = (
    "runner", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "mlflow", "hydra-core",
    "omegaconf", "numpy", "tokenizers", "safetensors",
)  # fmt: skip
_CHUNK = 1 << 22


@functools.cache
def code_digest() -> str:
    """Hash of the source code of this process, computed once; needs no git."""
    return digest_of_code(PACKAGE)


def digest_of_code(package: Path) -> str:
    """Hash (32 hex digits) of the sources in ``package``, its Hydra plugin and its YAML files."""
    conf = package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"
    plugin = package.with_name("hydra_plugins") / "runner_launcher.py"
    files = [(f"runner/{file.relative_to(package)}", file) for file in package.rglob("*.py")]
    files += [("hydra_plugins/runner_launcher.py", plugin)] if plugin.exists() else []
    files += [(f"conf/{file.relative_to(conf)}", file) for file in conf.rglob("*.yaml")]
    return digest_of(sorted(files))[:32]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed ``PACKAGES``."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@functools.cache
def lock_digest(top: Path = PACKAGE.parents[1]) -> str | None:
    """Hash of uv.lock; None if there is no such file, as in an installed package."""
    lock = top / "uv.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None


def machine() -> dict[str, Any]:
    """{host, cpu, cpus, system} of this machine, without importing torch."""
    return {"host": platform.node(), "cpu": _cpu_name(), "cpus": os.cpu_count(), "system": platform.platform()}


def weights_digest(folder: Path) -> str | None:
    """Hash (32 hex digits) of all tensors in the ``.safetensors`` files of ``folder``; None if there are none.

    Covers names, dtypes, shapes and bytes only: the same weights in other shards have the same hash.
    """
    tensors = sorted((tensor for file in folder.glob("*.safetensors") for tensor in _tensors(file)), key=lambda t: t[0])
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, form, file, first, last in tensors:
        digest.update(f"{name}\0{form}\0".encode())
        with file.open("rb") as handle:
            handle.seek(first)
            while first < last:
                first += len(chunk := handle.read(min(_CHUNK, last - first)))
                digest.update(chunk)
                if not chunk:
                    raise OSError(f"{file} is truncated: it ends within a tensor")
    return digest.hexdigest()[:32]


def remembered_digest(place: Path) -> str | None:
    """``weights_digest`` of a folder, or the hash of a file; read once as long as sizes and times stay the same."""
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    marks = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]
    note = cache_dir("digests") / f"{key}.txt"
    with contextlib.suppress(OSError):
        return note.read_text()
    if place.is_dir():
        digest = weights_digest(place)
    else:
        with place.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    if digest is not None:
        with contextlib.suppress(OSError):  # a full disk: it is read again next time
            write_atomic(note, digest)
    return digest


def _tensors(file: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """(name, dtype and shape, file, first byte, end byte) of each tensor, from the header of the safetensors file."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, f"{entry['dtype']}{entry['shape']}", file, 8 + length + first, 8 + length + last


@functools.cache
def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
