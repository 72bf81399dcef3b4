"""Values that are known although weights are fake. Whole models: ``tests/models/test_models_vision.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fixtures import pictures
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from runner.train.memory.known_values import KnownValues

pytestmark = pictures.needs_transformers_5
IDS = torch.tensor([[5, 1, 5, 2]])


@pytest.fixture
def weight() -> Iterator[Tensor]:
    with FakeTensorMode(), KnownValues(torch.device("cpu")):
        yield torch.empty(8, 3, requires_grad=True)


def test_what_no_weight_is_part_of_has_values(weight: Tensor) -> None:
    mask = IDS == 5
    assert mask.sum().item() == 2
    assert (torch.arange(4) * mask).tolist() == [[0, 0, 2, 0]]
    assert torch.full((2,), 7).tolist() == [7, 7]
    assert torch.bucketize(torch.tensor([0.3]), torch.arange(0.0, 1.0, 0.25)).tolist() == [2]


def test_what_weights_are_part_of_has_a_size_alone(weight: Tensor) -> None:
    rows = torch.nn.functional.embedding(IDS, weight)
    assert isinstance(rows, FakeTensor)
    assert isinstance(torch.zeros(2), FakeTensor), "a buffer of numbers is memory, and no position"
    with pytest.raises(Exception, match="_local_scalar_dense"):
        rows.sum().item()


def test_the_size_of_what_a_mask_selects_is_known(weight: Tensor) -> None:
    rows = torch.nn.functional.embedding(IDS, weight)
    chosen = rows[IDS == 5]
    assert chosen.shape == (2, 3)
    chosen.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == (8, 3)
    rows = rows.detach().clone()
    rows[IDS == 5] = 0.0
    assert rows.shape == (1, 4, 3)


def test_on_a_gpu_values_are_known_too() -> None:
    gpu = torch.device("cuda")  # its tensors are fake: there need not be one
    with FakeTensorMode(), gpu, KnownValues(gpu):
        rows = torch.nn.functional.embedding(IDS, torch.empty(8, 3))
        assert rows.device.type == "cuda"
        assert rows[IDS == 5].shape == (2, 3)
        assert torch.arange(3, device=gpu).tolist() == [0, 1, 2]
