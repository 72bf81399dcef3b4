"""Under fake tensors, keep the values of what no weight is part of: models read from them where images are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten
RANGES = (aten.arange, aten.linspace)
CONSTANTS = (aten.zeros, aten.ones, aten.full, aten.empty, aten.scalar_tensor)
SELECTIONS = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put)


class KnownValues(TorchDispatchMode):
    """A mode above ``FakeTensorMode``: an operation on real tensors alone is computed, on the CPU.

    Weights are fake, and so is all that is computed with them. Token ids, masks, grids and pixels are real: how many
    patches an encoder computes, and how they are cut into images, depends on their values.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        """That of the fake tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        packet = function.overloadpacket
        if all(map(_is_real, tensors)) and (tensors or _makes_positions(packet, args, kwargs)):
            with unset_fake_temporarily():
                return function(*args, **{**kwargs, **({"device": CPU} if "device" in kwargs else {})})
        if packet in SELECTIONS:
            args = (args[0], _positions(args[1]), *args[2:])
        args, kwargs = tree_map(self._fake, (args, kwargs))
        return function(*args, **kwargs)

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _is_real(value):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)


def _is_real(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor)


def _makes_positions(packet: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation without tensors makes a range or integers, of which positions and masks are computed."""
    if packet in RANGES:
        return True
    dtype = kwargs.get("dtype")
    if dtype is None:
        return packet is aten.full and isinstance(args[1], int)
    return packet in CONSTANTS and not dtype.is_floating_point and not dtype.is_complex


def _positions(indices: Any) -> list[Any]:
    """The indices of a selection, with the positions that a mask selects in its place: their number is known."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and _is_real(index):
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
