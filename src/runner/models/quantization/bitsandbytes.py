"""bitsandbytes: 8 and 4 bits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, Fault
from runner.models.dtypes import Precision, dtype_faults, dtype_for
from runner.models.kernels import compat
from runner.models.quantization.quant import Place, Places, Quant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one in double quantization."""
INT8_MAX = 127
"""The 8-bit value of the largest weight of a row."""
METHODS = (
    "beft", "hira", "ia3", "lily", "ln_tuning", "lora", "miss", "oft", "pvera", "randlora", "road", "trainable_tokens",
    "vera",
)  # fmt: skip
"""Methods that are correct on 4-bit and 8-bit weights (tested); others crash, or use packed bytes as weights."""


def int8() -> Int8:
    """Weights as LLM.int8() stores them (https://arxiv.org/abs/2208.07339).

    Plain LoRA layers unpack them and multiply in the dtype of the activations, as bitsandbytes does by itself when it
    trains on a CPU; the others (DoRA, dropout) leave it to bitsandbytes, which quantizes the activations on a GPU.
    """
    return Int8()


def four_bit(*, kind: Literal["nf4", "fp4"], double: bool, compute_dtype: Precision) -> FourBit:
    """4-bit weights, as in QLoRA (https://arxiv.org/abs/2305.14314)."""
    return FourBit(kind, double, compute_dtype)


def check_int8() -> Iterator[Fault]:
    yield from _library_faults()


def check_four_bit(*, compute_dtype: Precision, **_: Any) -> Iterator[Fault]:
    yield from _library_faults()
    yield from dtype_faults("compute_dtype", compute_dtype)


@dataclass(frozen=True)
class Int8(Quant):
    """8-bit weights with one float32 scale for each row."""

    name: str = "int8 (bitsandbytes)"
    methods: tuple[str, ...] = METHODS
    graph_breaks: str = "8-bit layers of bitsandbytes cause graph breaks"
    rounds_activations: bool = True
    unpacks: bool = True
    spares: bool = True

    def library_config(self, device: torch.device | str) -> Any:
        from transformers import BitsAndBytesConfig

        compat.check_quantization(device)
        return BitsAndBytesConfig(load_in_8bit=True)

    def selects(self, layer: nn.Module) -> bool:
        return _selects(layer)

    def holds(self, layer: nn.Module) -> bool:
        return hasattr(getattr(layer, "weight", None), "SCB")

    def bytes_of(self, rows: int, columns: int) -> float:
        return rows * columns + 4 * rows

    def after_load(self, model: nn.Module) -> None:
        """Let training run: each evaluation in float32 warns for every layer that its inputs are cast, and DoRA crashes
        (``_keep_scales``). Seen in bitsandbytes 0.50.2."""
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        layers: Iterator[Any] = filter(self.holds, model.modules())
        for layer in layers:
            layer.init_8bit_state = functools.partial(_keep_scales, layer)

    def state(self, layer: Any) -> Tensor:
        """The scales (rows,). The first forward pass moves them from the weight to the layer's state."""
        scales: Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return scales

    def unpack(self, weight: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        dense = weight.to(dtype) if out is None else out.copy_(weight)
        return dense.mul_(state[:, None] * (1 / INT8_MAX))


@dataclass(frozen=True)
class FourBit(Quant):
    """4-bit weights in blocks with a float32 scale; ``double``: the scales are in 8 bits."""

    kind: Literal["nf4", "fp4"]
    double: bool
    compute_dtype: Precision
    methods: tuple[str, ...] = METHODS
    unpacks: bool = True
    packs: bool = True
    spares: bool = True
    shards: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind} (bitsandbytes)"

    def library_config(self, device: torch.device | str) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        compat.check_quantization(device)
        fast = _name_of("auto", device)
        if torch.device(device).type == "cuda" and self.compute_dtype not in ("auto", fast):
            problem = f"this GPU computes 4-bit layers in {fast}: any other dtype is slow and gains nothing"
            raise ConfigError(Fault("quant.compute_dtype", problem, "use quant.compute_dtype=auto", self.compute_dtype))
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=dtype_for(self.compute_dtype, device),
        )

    def selects(self, layer: nn.Module) -> bool:
        return _selects(layer)

    def holds(self, layer: nn.Module) -> bool:
        return hasattr(getattr(layer, "weight", None), "quant_state")

    def bytes_of(self, rows: int, columns: int) -> float:
        blocks = rows * columns / BLOCK
        return rows * columns / 2 + (blocks * (1 + 4 / NESTED_BLOCK) if self.double else blocks * 4)

    @contextlib.contextmanager
    def loading_for(self, device: torch.device) -> Iterator[FourBit]:
        with _quantizing_on(device):
            yield replace(self, compute_dtype=_name_of(self.compute_dtype, device))

    def after_load(self, model: nn.Module) -> None:
        """Let training follow an evaluation.

        The first forward pass in eval mode on a CPU with AVX512-BF16 repacks the weights in place, permanently, for a
        kernel without a backward pass; later the gradients of all layers below would be lost, silently. Seen in
        bitsandbytes 0.50.2.
        """
        layers: Iterator[Any] = filter(self.holds, model.modules())
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False

    def state(self, layer: Any) -> Any:
        return layer.weight.quant_state

    def places(self, layer: Any) -> Places:
        weight, state = layer.weight, layer.weight.quant_state
        sharded, small = [Place(weight, "data"), Place(state, "absmax")], [Place(state, "code")]
        if state.nested:
            sharded.append(Place(state.state2, "absmax"))
            small += [Place(state.state2, "code"), Place(state, "offset")]
        return Places(sharded, small)

    def unpack(self, weight: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight, state).to(dtype)
        return dense if out is None else out.copy_(dense)

    def pack(self, weight: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=self.double, quant_type=self.kind
        )
        return packed, state


def _selects(layer: nn.Module) -> bool:
    """The layers that transformers replaces: no subclass of nn.Linear, but GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(layer) in (nn.Linear, Conv1D)


@contextlib.contextmanager
def _quantizing_on(device: torch.device) -> Iterator[None]:
    """Quantize weights that are loaded into the memory of the CPU on ``device``, one at a time.

    A thread of a CPU quantizes about ten million weights a second: 70 billion would take two hours.
    """
    from bitsandbytes.nn import Params4bit

    quantize = Params4bit._quantize

    def on_device(weight: Any, wanted: torch.device) -> Any:
        quantize(weight, device)
        weight.data = weight.data.to(wanted)
        weight.quant_state.to(wanted)
        return weight

    Params4bit._quantize = on_device
    try:
        yield
    finally:
        Params4bit._quantize = quantize


def _keep_scales(module: Any) -> None:
    """As ``Linear8bitLt.init_8bit_state``, but without overwriting scales by None.

    The first call moves weights and scales to ``module.state``. Then PEFT's DoRA, on a CPU, puts the weights back
    without scales at every step (``dequantize_module_weight``, PEFT 0.21.2); the original would overwrite them by None.
    """
    if module.weight.SCB is not None:
        module.state.CB, module.state.SCB = module.weight.CB, module.weight.SCB
    module.weight.CB = module.weight.SCB = None


def _name_of(name: Precision, device: torch.device | str) -> Precision:
    return "bfloat16" if str(dtype_for(name, device)) == "torch.bfloat16" else "float32"


def _library_faults() -> Iterator[Fault]:
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Fault("", "quantization needs bitsandbytes, which is not installed", "pip install bitsandbytes")
