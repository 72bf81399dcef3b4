"""A trained model in MLflow's layout of models, so that ``mlflow.pyfunc.load_model`` loads it.

The files are small and written beside the model, as MLflow's own ``save_model`` would copy the model. What answers is
``served.py``.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SERVED = Path(__file__).with_name("served.py")
PINNED = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "jinja2")
FILES = ("MLmodel", "requirements.txt", "python_env.yaml", SERVED.name)
"""What ``write`` adds to the folder of a model."""
TEXT = {"type": "string", "required": True}


def signature(outputs: Sequence[str], *, takes_pairs: bool) -> dict[str, str]:
    """Inputs, outputs and parameters as ``ModelSignature.from_dict`` reads them.

    ``outputs``: the names of the scores of a model with a score head; empty for one that answers.
    """
    given = [{**TEXT, "name": name} for name in ("prompt", "answer")] if takes_pairs else [TEXT]
    system = {"name": "system", "default": "", "shape": None, "type": "string"}
    sampling = [
        {"name": "max_new_tokens", "default": 256, "shape": None, "type": "long"},
        {"name": "temperature", "default": 0.0, "shape": None, "type": "double"},
    ]
    scores = [{"type": "double", "name": name, "required": True} for name in outputs]
    parts = {"inputs": given, "outputs": scores or [TEXT], "params": [system] if outputs else [*sampling, system]}
    return {name: json.dumps(part) for name, part in parts.items()}


def write(
    folder: Path, signed: Mapping[str, str], config: Mapping[str, Any], packages: Sequence[str], run_signature: str
) -> None:
    """Add the files to ``folder``, which has a whole model or an adapter.

    Args:
        signed: see ``signature``.
        config: what ``served`` needs: ``is_chat``, ``problem`` and, for an adapter, ``quantization``.
        packages: needed besides ``PINNED``.
        run_signature: the signature of the run.
    """
    flavor = {
        "artifacts": {"model": {"path": ".", "uri": "."}},
        "code": None,
        "config": dict(config),
        "env": {"virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.pyfunc.loaders.code_model",
        "model_code_path": SERVED.name,
        "python_version": platform.python_version(),
        "streamable": False,
    }
    model = {
        "flavors": {"python_function": flavor},
        "metadata": {"runner.signature": run_signature},
        "mlflow_version": _version("mlflow"),
        "signature": dict(signed),
        "utc_time_created": time.strftime("%F %T", time.gmtime()),
    }
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    shutil.copyfile(SERVED, folder / SERVED.name)
    (folder / "requirements.txt").write_text("\n".join(requirements(packages)) + "\n")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment))
    (folder / "MLmodel").write_text(yaml.safe_dump(model))


def requirements(packages: Sequence[str] = ()) -> list[str]:
    """pip requirements to serve the model: the versions installed here."""
    return [f"{package}=={version}" for package in (*PINNED, *packages) if (version := _version(package))]


def _version(package: str) -> str:
    """The installed version without its local part (+cu128), which package indexes do not have; empty if missing."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""
