"""Shard quantized weights with FSDP: the bytes of a decoder layer as one parameter.

FSDP2 shards parameters, and gives a layer plain tensors for them. A quantized weight is more than a tensor: bytes and
scales in objects of its library. So all bytes of a layer are copied to one parameter (uint8), one tensor after the
other. FSDP shards and gathers it together with the layer's other weights, one layer ahead, and frees it after use. It
allocates what it gathers once and then only resizes the storage: the tensors of the library become views of it, and so
do those that autograd keeps for the backward pass. Nothing that computes with the weights sees a difference.

Others store the bytes as bfloat16 (https://github.com/bitsandbytes-foundation/bitsandbytes/pull/970), keep the scales
whole on every rank, and put the library's class around what was gathered. Parameters of bytes need torch 2.12
(https://github.com/pytorch/pytorch/pull/178075).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from runner.models import parameters
from runner.models.quantization.quant import Place, Quant

ALIGNED = 16
"""Each tensor begins at a multiple of so many bytes."""


class View(NamedTuple):
    """A tensor of the quantization library, and where its bytes are."""

    place: Place
    start: int
    """Byte of the layer's parameter."""
    dtype: torch.dtype
    shape: torch.Size

    def show(self, gathered: torch.Tensor) -> None:
        """Make the tensor a view of ``gathered``, uint8 (n,)."""
        size = math.prod(self.shape) * self.dtype.itemsize
        self.place.put(gathered[self.start : self.start + size].view(self.dtype).view(self.shape))


def of(model: nn.Module) -> dict[nn.Module, nn.Parameter]:
    """The modules of the model whose weights are quantized, with these weights; each weight once."""
    quant: Quant = model.quant  # type: ignore[assignment]
    owners = {module: module._parameters.get("weight") for module in model.modules()}
    weights = {weight: module for module, weight in owners.items() if weight is not None and quant.holds(module)}
    return {module: weight for weight, module in weights.items()}


def pack(layer: nn.Module, quant: Quant, modules: list[nn.Module], ranks: int) -> list[View]:
    """Copy the bytes of the quantized ``modules`` of a layer to a new parameter of it, a multiple of ``ranks`` bytes.

    Returns the tensors that were copied; ``show`` replaces them.
    """
    views, end = list[View](), 0
    for place in (place for module in modules for place in quant.places(module).sharded):
        tensor = place.get()
        views.append(View(place, end, tensor.dtype, tensor.shape))
        end += -(-tensor.nbytes // ALIGNED) * ALIGNED
    packed = torch.zeros(-(-end // ranks) * ranks, dtype=torch.uint8)
    for view in views:
        content = view.place.get().reshape(-1).view(torch.uint8)
        packed[view.start : view.start + len(content)] = content
    layer.register_parameter(parameters.PACKED, nn.Parameter(packed, requires_grad=False))
    return views


def show(layer: Any, views: list[View]) -> None:
    """Gather the bytes of a sharded layer once, and make its quantized weights views of them; all ranks call this."""
    layer.unshard()
    gathered = getattr(layer, parameters.PACKED).detach()
    for view in views:
        view.show(gathered)
    layer.reshard()


def to(device: torch.device, quant: Quant, modules: list[nn.Module], *, whole: bool = False) -> None:
    """Move the small tables of quantized modules, which every rank has, to the device; ``whole``: the weights too."""
    for module in modules:
        places = quant.places(module)
        for place in (*places.small, *(places.sharded if whole else ())):
            place.put(place.get().to(device))
