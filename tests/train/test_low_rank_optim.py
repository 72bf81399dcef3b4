"""GaLore and APOLLO: the projection, and the size of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import node, option
from torch import nn

from runner.config.bind import bound_companion
from runner.errors import ConfigError
from runner.train.memory import optimizer_state


def with_gradient() -> nn.Parameter:
    weight = nn.Parameter(torch.zeros(48, 32))
    weight.grad = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    return weight


def groups_of(weight: nn.Parameter) -> list[dict[str, Any]]:
    return [{"params": [weight], "weight_decay": 0.0, "kind": "matrix"}]


def test_galore_is_adamw_on_the_projection_on_the_largest_singular_vectors() -> None:
    weight = with_gradient()
    gradient = weight.grad.clone()
    option("optim", "galore", rank=4, learning_rate=0.1)(groups_of(weight)).step()
    largest = torch.linalg.svd(gradient, full_matrices=False)[2][:4]
    expected = -0.1 * 0.25 * (gradient @ largest.t()).sign() @ largest  # the first step of Adam is a sign
    torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_the_state_of_low_rank_is_the_estimated_one(name: str) -> None:
    weight = with_gradient()
    groups, build = groups_of(weight), option("optim", name, rank=4)
    values_of = bound_companion("state_values", node("optim", name, rank=4))
    estimated = optimizer_state.state_bytes(build, groups, torch.device("cpu"), torch.float32, values_of)
    optimizer = build(groups)
    optimizer.step()
    state = optimizer.state[weight]
    held = [state["exp_avg"], state["exp_avg_sq"], state["projector"].ortho_matrix]
    assert estimated == sum(each.nbytes for each in held) == 4 * (2 * 48 * 4 + 4 * 32)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_a_rank_that_projects_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"optim\.rank=64: no trained matrix has more rows and columns"):
        option("optim", name, rank=64)(groups_of(with_gradient()))
