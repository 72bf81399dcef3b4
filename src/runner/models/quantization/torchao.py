"""torchao: 8 bits, as integers or as floats; products are computed in the dtype of the model.

4 bits are left to bitsandbytes: PEFT has no LoRA layer for weights that torchao packs (TorchaoLoraLinear of 0.21).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, Fault
from runner.models.kernels import compat
from runner.models.quantization.quant import Quant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Kind = Literal["int8", "float8"]
CONFIGS = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
"""Kind → torchao's configuration class."""


def weight_only(*, kind: Kind) -> Torchao:
    """8-bit weights with one scale for each row; activations are not quantized (https://github.com/pytorch/ao)."""
    return Torchao(kind)


@dataclass(frozen=True)
class Torchao(Quant):
    """8-bit weights of torchao."""

    kind: Kind
    unpacks: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind} (torchao)"

    def library_config(self, device: torch.device | str) -> Any:  # noqa: ARG002
        if not compat.at_least("transformers", "5"):
            raise ConfigError(
                Fault("quant", "quant=torchao needs transformers 5", "install transformers >= 5, or use 8bit")
            )
        if importlib.util.find_spec("torchao") is None:
            problem, remedy = "quant=torchao needs torchao, which is not installed", "uv pip install torchao"
            raise ConfigError(Fault("quant", problem, remedy))
        from torchao import quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, CONFIGS[self.kind])())

    def holds(self, layer: nn.Module) -> bool:
        from torchao.utils import TorchAOBaseTensor

        return isinstance(getattr(layer, "weight", None), TorchAOBaseTensor)

    def bytes_of(self, rows: int, columns: int) -> float:
        return rows * columns + 4 * rows

    def unpack(self, weight: Any, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return super().unpack(weight.dequantize(), state, dtype, out)
