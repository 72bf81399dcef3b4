"""Quantization options: how the frozen base weights are stored while an adapter trains on them.

Only the linear layers inside the decoder are quantized; embeddings, norms and ``lm_head`` keep the model's dtype. We do
not upcast norms and head to float32 as ``peft.prepare_model_for_kbit_training`` does: the norms of every supported
family compute in float32 anyway, and a float32 head costs memory (1 GiB for Llama-3's vocabulary) for nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, Fault
from runner.models.dtypes import Precision, dtype_faults, dtype_for

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one in double quantization: bitsandbytes' own."""


@dataclass(frozen=True)
class Quant:
    """How linear weights are stored; ``bits`` None: as they are."""

    name: str
    bits: Literal[4, 8] | None = None
    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = False
    compute_dtype: Precision = "auto"

    @property
    def bytes_per_weight(self) -> float | None:
        """Bytes for one weight of a linear layer, scales included; None: those of the model's dtype."""
        if self.bits is None:
            return None
        if self.bits == 8:
            return 1.0  # and one float32 scale for a whole row
        return 0.5 + ((1 + 4 / NESTED_BLOCK) if self.double else 4) / BLOCK


def none() -> Quant:
    """Weights as they are."""
    return Quant("none")


def int8() -> Quant:
    """Weights as LLM.int8() of bitsandbytes stores them (https://arxiv.org/abs/2208.07339).

    Plain LoRA layers unpack them and multiply in the dtype of the activations, as bitsandbytes does by itself when it
    trains on a CPU; the others (DoRA, dropout) leave it to bitsandbytes, which quantizes the activations on a GPU.
    """
    return Quant("8bit", 8)


def four_bit(*, kind: Literal["nf4", "fp4"], double: bool, compute_dtype: Precision) -> Quant:
    """4-bit weights of bitsandbytes, as in QLoRA (https://arxiv.org/abs/2305.14314)."""
    return Quant("4bit" if kind == "nf4" else kind, 4, kind, double, compute_dtype)


def check_int8() -> Iterator[Fault]:
    yield from _library_faults()


def check_four_bit(*, compute_dtype: Precision, **_: Any) -> Iterator[Fault]:
    yield from _library_faults()
    yield from dtype_faults("compute_dtype", compute_dtype)


def library_config(quant: Quant, device: torch.device | str) -> Any:
    """The ``quantization_config`` for ``from_pretrained``; None where nothing is quantized.

    Raises:
        ConfigError: a compute dtype that wastes a GPU with bfloat16.
    """
    if quant.bits is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if quant.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if torch.device(device).type == "cuda" and quant.compute_dtype not in ("auto", fast := _name_of("auto", device)):
        problem = f"this GPU computes 4-bit layers in {fast}: any other dtype is slow and gains nothing"
        raise ConfigError(Fault("quant.compute_dtype", problem, "use quant.compute_dtype=auto", quant.compute_dtype))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=dtype_for(quant.compute_dtype, device),
    )


def make_trainable(model: nn.Module) -> None:
    """Take out of bitsandbytes' layers what serves inference on a CPU and would break the training that follows.

    4 bits: the first forward pass in eval mode on a CPU with AVX512-BF16 repacks the weights in place, for good, for a
    kernel without a backward; training after an evaluation would lose the gradients of all layers below, silently.
    8 bits: each evaluation in float32 says of every layer that its inputs are cast, and DoRA crashes, see
    ``_keep_scales``. (Seen in bitsandbytes 0.50.2.)
    """
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.init_8bit_state = functools.partial(_keep_scales, module)


def leave_file(model: nn.Module) -> None:
    """Copy what was not quantized, if it lies in a file mapped into memory: one such weight keeps the whole file there.

    That is what the quantized weights were made of, and larger than they are. (On a CPU transformers maps weights.)
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()


def _keep_scales(module: Any) -> None:
    """What ``Linear8bitLt.init_8bit_state`` does, but for scales that are not there.

    The first call moves weights and scales to ``module.state``. Then PEFT's DoRA, on a CPU, puts the weights back
    without scales at every step (``dequantize_module_weight``, PEFT 0.21.2); the original would overwrite them by None.
    """
    if module.weight.SCB is not None:
        module.state.CB, module.state.SCB = module.weight.CB, module.weight.SCB
    module.weight.CB = module.weight.SCB = None


def _name_of(name: Precision, device: torch.device | str) -> str:
    return str(dtype_for(name, device)).removeprefix("torch.")


def _library_faults() -> Iterator[Fault]:
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Fault("", "quantization needs bitsandbytes, which is not installed", "pip install bitsandbytes")
