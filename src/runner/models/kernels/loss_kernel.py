"""Cross entropy and its gradient in one kernel of Triton: the logits are read twice and written once.

That is 6 bytes for each logit in bfloat16; PyTorch's operations need 26 to 34, with a float32 copy in between. Only for
GPUs. Import it only where Triton is installed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 16384, 32
"""Logits of a row that are in registers at the same time, and warps for them."""
log = logging.getLogger(__name__)


def losses_(logits: Tensor, targets: Tensor, ignored: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood (n,) in nats, float32; whether the target has the highest logit (n,)).

    Overwrites ``logits`` (n, V), whose rows are contiguous, with the gradient of the first. Rows whose target is
    ``ignored`` have a loss and a gradient of 0, and are not correct.
    """
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    correct = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    if len(logits):
        block = min(block, triton.next_power_of_2(logits.shape[1]))
        arguments = logits, targets, nll, correct, logits.stride(0), logits.shape[1], ignored
        _losses[(len(logits),)](*arguments, BLOCK=block, num_warps=WARPS)
    return nll, correct


@functools.cache
def is_right(
    device: torch.device, dtype: torch.dtype, reference: Callable[[Tensor, Tensor], tuple[Tensor, ...]], ignored: int
) -> bool:
    """Whether the kernel compiles here and computes what ``reference`` computes, on a few rows."""
    try:
        ours = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).mul_(4).to(device, dtype)
        theirs, targets = ours.clone(), torch.tensor([0, 999, ignored, 7], device=device)
        found, expected = losses_(ours, targets, ignored), reference(theirs, targets)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close((ours, *found), (theirs, *expected), atol=tolerance, rtol=tolerance)
    except Exception as error:  # Triton raises many kinds, a C compiler that is missing among them
        log.debug("the loss is computed without the kernel of Triton", exc_info=error)
        return False
    return True


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _losses(logits, targets, nll, correct, stride, columns, ignored, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(targets + row)
    is_trained = label != ignored
    # Read before the reductions below, in which all threads wait for each other: the gradient overwrites it.
    chosen = tl.load(logits + tl.where(is_trained, label, 0)).to(tl.float32)
    highest, total = -1.0e30, 0.0  # not -inf, of which a block of logits that are all -inf would make NaN
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(part, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(part - higher), 0)
        highest = higher
    tl.store(nll + row, tl.where(is_trained, tl.log(total) + highest - chosen, 0.0))
    tl.store(correct + row, is_trained & (chosen == highest))
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        slope = tl.exp(part - highest) / total - tl.where(at == label, 1.0, 0.0)
        tl.store(logits + at, tl.where(is_trained, slope, 0.0).to(logits.dtype.element_ty), mask=at < columns)
