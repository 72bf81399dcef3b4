"""bitsandbytes' optimizers wait for the GPU once a step where states are paged, else never."""

from __future__ import annotations

from typing import Any

import bitsandbytes.optim.optimizer as library
import pytest
import torch
from fixtures import versions
from torch import nn

from runner.train import bitsandbytes_steps, optim


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each wait of the library was called with."""
    calls: list[Any] = []
    monkeypatch.setattr(library, "sync_gpu", calls.append)
    return calls


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))


def made(module: nn.Module, option: str) -> Any:
    groups = optim.parameter_groups(module, 0.01)
    if option == "lion":
        return optim.lion(groups, learning_rate=1e-3, weight_decay=0.0, betas=[0.9, 0.99], bits=8)
    return optim.adamw_bnb(
        groups, learning_rate=1e-3, weight_decay=0.01, betas=[0.9, 0.999], eps=1e-8, bits=8, paged=False
    )


@pytest.mark.parametrize("option", ["adamw_8bit", "lion"])
def test_a_step_does_not_wait(option: str, waits: list[Any]) -> None:
    module = model()
    optimizer = made(module, option)
    made(module, option)  # a second one changes nothing
    module(torch.randn(4, 64)).sum().backward()
    before = [parameter.clone() for parameter in module.parameters()]
    optimizer.step()
    assert not waits
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


@versions.optimizers_on_cpu
def test_a_paged_optimizer_waits_once_and_pages_what_is_loaded(
    waits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.optim import AdamW

    monkeypatch.setattr(bitsandbytes_steps, "PAGED_FROM", 4096)
    module = model()
    trained = AdamW(module.parameters(), lr=1e-3, optim_bits=8)
    module(torch.randn(4, 64)).sum().backward()
    trained.step()
    saved = trained.state_dict()
    optimizer = AdamW(module.parameters(), lr=1e-3, optim_bits=8)
    optimizer.is_paged = True  # set later: on a CPU the library warns and does not page
    pages: list[torch.Tensor] = []

    def buffer(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        pages.append(torch.zeros_like(parameter, dtype=dtype))
        return pages[-1]

    monkeypatch.setattr(optimizer, "get_state_buffer", buffer)
    waits.clear()
    bitsandbytes_steps.repaired(optimizer)
    optimizer.load_state_dict(saved)
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    assert len(pages) == 2 * len(matrices), "two states of each matrix; vectors are too small"
    for parameter in matrices:
        loaded = optimizer.state[parameter]["state1"]
        assert any(loaded is page for page in pages)
        assert torch.equal(loaded, trained.state[parameter]["state1"])
    optimizer.step()
    assert len(waits) == 1
