"""Norms of the gradients and the trained weights of each decoder layer: ``train.layer_norms``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.models import shards
from runner.models.kernels import compilation

OTHER = "other"
"""The trained weights outside of the decoder layers: embeddings, head, norms."""


@dataclass(frozen=True)
class LayerNorms:
    """Measures a model at the steps that are logged."""

    model: nn.Module
    every: int | None
    """Steps between two measurements; None: never."""
    last: int
    """Number of the last step, which is measured too."""

    def measure(self, step: int) -> dict[str, Tensor]:
        """``layers/NN/grad_norm`` and ``layers/NN/weight_norm``, (), of the step ``step``, counted from 1.

        Call it between the backward pass and clipping, on all ranks; it does not wait for the device.
        """
        if self.every is None or (step % self.every and step != self.last):
            return {}
        norms = {}
        for name, parameters in self._groups().items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms[f"layers/{name}/grad_norm"] = _norm(gradients, parameters)
            norms[f"layers/{name}/weight_norm"] = _norm(parameters, parameters)
        return norms

    def _groups(self) -> dict[str, list[nn.Parameter]]:
        """Number of each layer → its trained parameters."""
        layers = compilation.layers_of(self.model)
        digits = len(str(len(layers) - 1))
        owners = {id(p): f"{number:0{digits}d}" for number, layer in enumerate(layers) for p in layer.parameters()}
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                groups.setdefault(owners.get(id(parameter), OTHER), []).append(parameter)
        return groups


def _norm(tensors: Iterable[Any], parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all values together, () float64; 0 without tensors."""
    norms = [torch.linalg.vector_norm(tensor.detach().float()) for tensor in tensors]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    return shards.whole(torch.linalg.vector_norm(torch.stack(norms))).double()
