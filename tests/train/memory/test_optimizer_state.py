"""The memory of an optimizer's state, before training, against that after a step of the parameters themselves."""

from __future__ import annotations

import conftest
import pytest
import torch
from torch import nn

from runner.errors import ConfigError
from runner.train import optim
from runner.train.memory import optimizer_state

RANK_8 = [(8, 576)] * 3 + [(1536, 8)] * 2
"""The shapes of LoRA matrices."""
FULL = [(1024, 576), (576,), (2048, 300)]


@pytest.mark.parametrize("shapes", [RANK_8, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("adamw", {}),
        ("muon", {}),
        ("adamw_8bit", {}),
        ("lion", {}),
        ("torch", {"name": "SGD", "momentum": 0.9}),
        ("torch", {"name": "Adafactor"}),
        ("torch", {"name": "SGD"}),
    ],
    ids=lambda value: str(value),
)
def test_the_state_of_an_optimizer_is_that_after_a_step(
    name: str, changes: dict[str, object], shapes: list[tuple[int, ...]]
) -> None:
    """Also of parameters that are extrapolated; bitsandbytes rounds up to blocks."""
    groups = grouped(shapes)
    built = conftest.option("optim", name, **changes)
    size = optimizer_state.state_bytes(built, groups, torch.device("cpu"), torch.float32)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer = built(groups)
    optimizer.step()
    true = sum(tensor.nbytes for tensor in optimizer_state._tensors(dict(optimizer.state)))
    assert size == pytest.approx(true, rel=1e-3)


def grouped(shapes: list[tuple[int, ...]]) -> optim.Groups:
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    return optim.parameter_groups(model, 0.1)


def test_only_small_parameters_are_created_for_the_measurement() -> None:
    sizes: list[int] = []

    def watching(groups: optim.Groups) -> torch.optim.Optimizer:
        sizes.extend(parameter.numel() for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups)

    with torch.device("meta"):
        groups = grouped([(150_000, 4096)] * 2 + [(16, 2048, 64)])
    size = optimizer_state.state_bytes(watching, groups, torch.device("cpu"), torch.bfloat16)
    assert max(sizes) <= optimizer_state.VALUES
    assert size == pytest.approx(4 * (2 * 150_000 * 4096 + 16 * 2048 * 64), rel=1e-3)


def test_an_optimizer_that_makes_no_step_here_is_refused_before_training() -> None:
    def broken(groups: object) -> object:
        raise RuntimeError("no kernel for this device")

    with pytest.raises(ConfigError, match="cannot make a step on cpu: RuntimeError: no kernel for this device"):
        optimizer_state.state_bytes(broken, grouped([(4, 4)]), torch.device("cpu"), torch.float32)
