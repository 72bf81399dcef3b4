"""Weights of GPTQ and AWQ files as plain weights: their kernels are for inference, so they are dequantized to train.

Of a linear layer they store ``qweight``, integers of a few bits packed into int32, lowest bits first, and for each
group of inputs ``scales`` and ``qzeros``: weight = (integer - zero) * scale.

- GPTQ (https://arxiv.org/abs/2210.17323) packs along the inputs. ``g_idx`` is the group of each input; without it,
  groups are equal parts in order. The format ``gptq`` stores zeros less one, ``gptq_v2`` as they are.
- AWQ (https://arxiv.org/abs/2306.00978), version ``gemm``, packs along the outputs, in an order of its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault
from runner.models import model_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHODS = ("gptq", "awq")
BITS = {"gptq": (2, 4, 8), "awq": (4,)}
"""Widths that fill an int32 without a rest."""
FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of the eight integers of a word, from the lowest bits on: where the integer of each output is."""


def problems(method: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Why files of this method cannot be read; ``given``: ``quantization_config`` of the model."""
    bits, stored = given.get("bits", 4), _format(method, given)
    if bits not in BITS[method]:
        yield f"has {bits} bits, and only {', '.join(map(str, BITS[method]))} can be read"
    if stored not in FORMATS[method]:
        yield f"is in the format {stored}, and only {', '.join(FORMATS[method])} can be read"


def read(folder: Path, method: str, given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Name → weight of a model folder, on the CPU; dequantized weights (outputs, inputs) in ``dtype``.

    Raises:
        ConfigError: a packed weight lacks its scales or zeros, or their shapes do not fit.
    """
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for file in model_folder.weight_files(folder):
        stored |= load_file(file)
    weights = {name: tensor for name, tensor in stored.items() if not _is_part(name, stored)}
    for name in [name for name in stored if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        parts = {part: stored.pop(f"{layer}.{part}", None) for part in ("qweight", "qzeros", "scales", "g_idx")}
        try:
            weights[f"{layer}.weight"] = dequantized(method, given, **parts).to(dtype)
        except (AttributeError, RuntimeError, IndexError) as error:
            problem = f"the packed weight {name} does not fit its scales and zeros"
            raise ConfigError(Fault("model.path", problem, "download the model again", folder)) from error
    return weights


def dequantized(
    method: str, given: Mapping[str, Any], qweight: Any, qzeros: Any, scales: Any, g_idx: Any = None
) -> Tensor:
    """The weight (outputs, inputs), float32, of a linear layer.

    GPTQ: ``qweight`` (inputs · bits / 32, outputs), ``g_idx`` (inputs,). AWQ: (inputs, outputs · bits / 32). Both:
    ``qzeros`` (groups, outputs · bits / 32), int32, and ``scales`` (groups, outputs).
    """
    import torch

    bits = given.get("bits", 4)
    if method == "gptq":
        integers, zeros = _unpacked(qweight, bits, 0), _unpacked(qzeros, bits, 1)
        zeros = (zeros + (_format(method, given) == "gptq")) & (2**bits - 1)
    else:
        integers, zeros = (_in_order(_unpacked(words, bits, 1)) for words in (qweight, qzeros))
    if g_idx is None:
        g_idx = torch.arange(len(integers)) // -(-len(integers) // len(scales))
    groups = g_idx.long()
    weight: Tensor = (integers - zeros[groups]) * scales.float()[groups]
    return weight.t().contiguous()


def _format(method: str, given: Mapping[str, Any]) -> str:
    if method == "awq":
        return str(given.get("version") or "gemm").lower()
    return str(given.get("checkpoint_format") or "gptq").lower()


def _unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The integers of int32 words, which were packed along ``dim``, the lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    return ((words.unsqueeze(dim + 1) >> shifts.view(shape)) & (2**bits - 1)).flatten(dim, dim + 1)


def _in_order(integers: Tensor) -> Tensor:
    """AWQ's integers (…, outputs) in the order of the outputs."""
    return integers.unflatten(-1, (-1, len(AWQ_ORDER)))[..., list(AWQ_ORDER)].flatten(-2)


def _is_part(name: str, stored: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a part of a packed weight."""
    layer, _, part = name.rpartition(".")
    return part in ("qweight", "qzeros", "scales", "g_idx") and f"{layer}.qweight" in stored
