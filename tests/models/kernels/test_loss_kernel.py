"""The kernel of Triton, computed by Triton's interpreter on a CPU, against PyTorch's operations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from runner.data.packing import IGNORED
from runner.tasks import logit_losses

DTYPES = torch.float32, torch.bfloat16


def losses_are_those_of_pytorchs_operations(dtype: torch.dtype) -> None:
    from runner.models.kernels import loss_kernel

    numbers = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 90, generator=numbers)).to(dtype)[:, :77]  # rows that do not follow each other
    logits[1, :20] = float("-inf")
    targets = torch.tensor([3, 76, IGNORED, 0, int(logits[4].argmax())])
    ours, theirs = logits.clone(), logits.clone()
    found = loss_kernel.losses_(ours, targets, IGNORED, block=16)
    expected = logit_losses.by_operations_(theirs, targets, logit_losses.PLAIN, needs_grad=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-5)
    assert found[1][4]
    assert not ours[2].any()
    nll, correct = loss_kernel.losses_(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), IGNORED)
    assert len(nll) == len(correct) == 0


def it_is_tried_before_it_is_used() -> None:
    from runner.models.kernels import loss_kernel

    def reference(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return logit_losses.by_operations_(logits, targets, logit_losses.PLAIN, needs_grad=True)

    def wrong(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nll, correct = reference(logits, targets)
        return nll + 0.1, correct

    device = torch.device("cpu")
    assert loss_kernel.is_right(device, torch.bfloat16, reference, IGNORED)
    assert not loss_kernel.is_right(device, torch.bfloat16, wrong, IGNORED)


@pytest.mark.slow
@pytest.mark.cold
def test_losses_and_gradients_are_those_of_pytorchs_operations() -> None:
    """In a process of its own: Triton reads when it is imported whether it interprets."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_triton_that_cannot_compute_here_is_left() -> None:
    """On a CPU it has no driver, as on a GPU without a C compiler."""
    pytest.importorskip("triton")
    from runner.models.kernels import loss_kernel

    assert not loss_kernel.is_right(torch.device("cpu"), torch.float32, lambda *_: (), IGNORED)


if __name__ == "__main__":
    for each in DTYPES:
        losses_are_those_of_pytorchs_operations(each)
    it_is_tried_before_it_is_used()
