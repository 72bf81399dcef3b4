"""The loss of tokens under a policy gradient, by hand."""

from __future__ import annotations

import pytest
import torch

from runner.tasks import policy_loss


def test_each_type_reduces_the_tokens_in_its_way() -> None:
    loss, lengths = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3, 1])
    sums = {kind: float(policy_loss.reduced(loss, lengths, kind, 8)) for kind in ("dapo", "cispo", "grpo", "dr_grpo")}
    assert sums == {"dapo": 10.0, "cispo": 10.0, "grpo": 2.0 + 4.0, "dr_grpo": 10.0 / 8}


@pytest.mark.parametrize(
    ("kind", "expected", "clipped"),
    [
        ("grpo", [-0.5, 0.8, -1.2, 1.5], [False, True, True, False]),
        ("cispo", [-0.5 * -0.6931, 0.5 * -0.6931, -1.2 * 0.4055, 1.2 * 0.4055], [False, False, True, True]),
    ],
)
def test_only_the_ratios_beyond_the_limits_are_clipped(kind: str, expected: list[float], clipped: list[bool]) -> None:
    """Ratios 0.5 and 1.5 with both signs of the advantage; cispo limits the factor of the log-probability instead."""
    log_ratio, advantage = torch.tensor([0.5, 0.5, 1.5, 1.5]).log(), torch.tensor([1.0, -1.0, 1.0, -1.0])
    lower, upper = (None, 1.2) if kind == "cispo" else (0.2, 0.2)
    loss, is_clipped, kl = policy_loss.token_loss(
        log_ratio, log_ratio, advantage, torch.ones(4, dtype=torch.int64), None, kind, "token", 0.0, lower, upper
    )
    assert loss.tolist() == pytest.approx(expected, abs=1e-4)
    assert is_clipped.tolist() == clipped
    assert kl is None
