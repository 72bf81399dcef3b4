"""What a run is made of besides its configuration: the program's text, packages and their lock, machine, weights.

Two runs with the same of all of these, and the same configuration and data, compute the same.
"""

from __future__ import annotations

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

PACKAGES = (
    "runner", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "mlflow", "hydra-core",
    "omegaconf", "numpy", "tokenizers", "safetensors",
)  # fmt: skip
_CHUNK = 1 << 22


@functools.cache
def code_digest() -> str:
    """The program that this process runs: every file of it, wherever it is installed; asked once, without git."""
    return digest_of_code(PACKAGE)


def digest_of_code(package: Path) -> str:
    """32 hexadecimal digits over the sources in ``package``, its door to Hydra, and the YAML files of its options."""
    conf = package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"
    door = package.with_name("hydra_plugins") / "runner_launcher.py"
    named = [(f"runner/{file.relative_to(package)}", file) for file in package.rglob("*.py")]
    named += [("hydra_plugins/runner_launcher.py", door)] if door.exists() else []
    named += [(f"conf/{file.relative_to(conf)}", file) for file in conf.rglob("*.yaml")]
    found = hashlib.sha256()
    for name, file in sorted(named):
        text = file.read_bytes()
        found.update(f"{name}\0{len(text)}\0".encode() + text)
    return found.hexdigest()[:32]


@functools.cache
def versions() -> dict[str, str]:
    """The version of Python and of each of ``PACKAGES`` that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def lock_digest(top: Path = PACKAGE.parents[1]) -> str | None:
    """The hash of the checkout's lock file; None where there is none, as in an installed package."""
    lock = top / "uv.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None


def machine() -> dict[str, Any]:
    """This machine, seen without importing torch: {host, cpu, cpus, system}."""
    return {"host": platform.node(), "cpu": _cpu_name(), "cpus": os.cpu_count(), "system": platform.platform()}


def weights_digest(folder: Path) -> str | None:
    """32 hexadecimal digits over all tensors in the ``.safetensors`` files of ``folder``; None where there are none.

    Over names, types, shapes and bytes, and nothing else: the same weights cut into other files have the same digest.
    """
    tensors = sorted((tensor for file in folder.glob("*.safetensors") for tensor in _tensors(file)), key=lambda t: t[0])
    if not tensors:
        return None
    found = hashlib.sha256()
    for name, form, file, first, last in tensors:
        found.update(f"{name}\0{form}\0".encode())
        with file.open("rb") as handle:
            handle.seek(first)
            while first < last:
                first += len(chunk := handle.read(min(_CHUNK, last - first)))
                found.update(chunk)
                if not chunk:
                    raise OSError(f"{file} ends within a tensor")
    return found.hexdigest()[:32]


def _tensors(file: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """(name, type and shape, file, first byte, byte after the last) of each tensor; the format is safetensors' own."""
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
