"""Activation offload (``train.memory=offload``): the inputs of recomputed layers wait in the memory of the CPU.

As in ``torch.autograd.graph.save_on_cpu``, whose copies would be made on the default device of a simulated step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks


def install(layer: nn.Module) -> None:
    """Keep the inputs of a layer that torch's checkpoint recomputes in CPU memory until its backward pass, in place.

    The checkpoint has hooks of its own for what is saved inside of the layer, so these see the inputs only.
    """
    forward = layer.forward

    def offloading_forward(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(to_cpu, to_device):
            return forward(*args, **kwargs)

    layer.forward = offloading_forward


def to_cpu(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """(device of the tensor, its copy in CPU memory); page-locked, so that Python need not wait for the copy."""
    pinned = tensor.is_cuda and not isinstance(tensor, FakeTensor)
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return tensor.device, copy.copy_(tensor, non_blocking=pinned)


def to_device(saved: tuple[torch.device, Tensor]) -> Tensor:
    """The tensor on its device again."""
    device, copy = saved
    return copy.to(device, non_blocking=True)
