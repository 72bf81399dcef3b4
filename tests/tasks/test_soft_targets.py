"""The divergence from a teacher with another number of tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import kl_div

from runner.tasks import soft_targets


def test_a_padded_vocabulary_is_cut_to_the_common_part() -> None:
    torch.manual_seed(0)
    logits, taught = torch.randn(4, 12), torch.randn(4, 10)
    soft = soft_targets.Soft(lambda numbers, size: taught[numbers][:, :size], 0.0, 1.0, 1.0)
    buffer = logits.clone()
    loss, *_ = soft_targets.losses_(buffer, torch.arange(4), soft, needs_grad=True)
    s, t = logits[:, :10].log_softmax(-1), taught.log_softmax(-1)
    torch.testing.assert_close(loss, kl_div(s, t, reduction="none", log_target=True).sum(-1))
    torch.testing.assert_close(buffer[:, :10], s.exp() - t.exp())
    assert not buffer[:, 10:].any()
