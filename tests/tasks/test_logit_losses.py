"""The losses of rows of logits, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch

from runner.data.packing import IGNORED
from runner.tasks import logit_losses
from runner.tasks.logit_losses import PLAIN, Shaping


@pytest.mark.parametrize("shaping", [PLAIN, Shaping(label_smoothing=0.1), Shaping(z_loss=0.01)], ids=str)
def test_the_gradient_overwrites_the_logits(shaping: Shaping) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 49, IGNORED, 0, 7, 7])
    exact = logits.double().requires_grad_()
    smoothing = shaping.label_smoothing
    options = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "none"}
    expected = torch.nn.functional.cross_entropy(exact, targets, **options)
    expected = expected + (targets != IGNORED) * shaping.z_loss * exact.logsumexp(-1).square()
    expected.sum().backward()
    loss, correct, *_ = logit_losses.cross_entropy_(logits, targets, shaping, needs_grad=True)
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(logits, exact.grad.float())
    assert correct.tolist() == ((exact.argmax(-1) == targets) & (targets != IGNORED)).tolist()


def test_there_is_no_kernel_for_a_cpu() -> None:
    assert not logit_losses.has_kernel(torch.device("cpu"), torch.bfloat16)
