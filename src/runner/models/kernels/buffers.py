"""Memory for what lives for one operation of a layer and is as large in the next one.

Taken from the heap each time, it would leave holes between what is kept for the backward pass, and be cleared anew.
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
    """A tensor of this shape, on the device and, unless told, of the dtype of ``like``; it holds what was left there.

    On a CPU it is valid until the next one of that name is taken. Elsewhere, and where nothing is really computed
    (compiling, fake tensors), it is a new one: other devices keep freed memory themselves.
    """
    if like.device.type != "cpu" or type(like) is not Tensor or torch.compiler.is_compiling():
        return like.new_empty(shape, dtype=dtype)
    size = math.prod(shape) * (dtype or like.dtype).itemsize
    if name not in _BUFFERS.named or _BUFFERS.named[name].nbytes() < size:
        _BUFFERS.named[name] = torch.UntypedStorage(size)
    return like.new_empty(0, dtype=dtype).set_(_BUFFERS.named[name], 0, torch.Size(shape))  # type: ignore[call-overload]


def held() -> int:
    """Bytes that this thread keeps for all names: some MB, which no estimate counts."""
    return sum(storage.nbytes() for storage in _BUFFERS.named.values())
