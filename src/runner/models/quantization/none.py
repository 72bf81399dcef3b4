"""No quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.models.quantization.quant import Quant

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Plain(Quant):
    """Weights as the model has them."""

    name: str = "none"
    plain: bool = True

    def selects(self, layer: nn.Module) -> bool:  # noqa: ARG002
        return False

    def holds(self, layer: nn.Module) -> bool:  # noqa: ARG002
        return False

    def bytes_of(self, rows: int, columns: int) -> float:
        raise AssertionError(f"no weight of shape ({rows}, {columns}) is quantized")


def none() -> Plain:
    """Weights as they are."""
    return Plain()
