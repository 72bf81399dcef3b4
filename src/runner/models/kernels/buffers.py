"""Reusable CPU buffers for temporary tensors that have the same size in every layer.

Allocating them for each layer would fragment the heap between the saved activations, and the kernel would zero the
new pages each time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.named: dict[str, torch.UntypedStorage] = {}


_BUFFERS = _Buffers()


def take(name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape, on the device of ``like``; ``dtype`` defaults to that of ``like``.

    On a CPU it is valid until the next call with the same ``name``. On other devices (whose allocators reuse freed
    memory), while compiling and with fake tensors, it is a newly allocated tensor.
    """
    if like.device.type != "cpu" or type(like) is not Tensor or torch.compiler.is_compiling():
        return like.new_empty(shape, dtype=dtype)
    size = math.prod(shape) * (dtype or like.dtype).itemsize
    if name not in _BUFFERS.named or _BUFFERS.named[name].nbytes() < size:
        _BUFFERS.named[name] = torch.UntypedStorage(size)
    return like.new_empty(0, dtype=dtype).set_(_BUFFERS.named[name], 0, torch.Size(shape))  # type: ignore[call-overload]
