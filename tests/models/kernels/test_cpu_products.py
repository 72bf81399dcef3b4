"""Products by oneDNN: what they compute, and where they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from runner.models.kernels import cpu_products

ONEDNN, MKL = "mkldnn::_linear_pointwise", "aten::mm"


class Called(TorchDispatchMode):
    """The names of the operators that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def called(x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    with Called() as mode:
        cpu_products.product(x, weight)
    return [name for name in mode.names if name in (ONEDNN, MKL)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_it_multiplies_weights_with_any_strides() -> None:
    x, wide = torch.randn(37, 48), torch.randn(20, 56)
    for weight in (wide[:, :48].contiguous(), wide[:, :48], wide[:, :48].t().contiguous().t()):
        found, expected = cpu_products._by_onednn(x, weight), x.double() @ weight.double().t()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_large_products_are_those_of_onednn_where_it_is_used() -> None:
    x, weight = torch.ones(256, 256), torch.ones(256, 256)
    large = ONEDNN if cpu_products.is_used() else MKL
    assert called(x, weight) == [large]
    assert called(x[:255], weight) == [MKL]  # too small
    assert called(x.bfloat16(), weight.bfloat16()) == [MKL]
    with FakeTensorMode() as mode:
        assert cpu_products.product(mode.from_tensor(x), mode.from_tensor(weight)).shape == (256, 256)


@pytest.mark.parametrize(
    ("limits", "are"), [(("24", "24"), True), (("24", "1024"), False), (("24", ""), False), (("0", "x"), False)]
)
def test_it_is_not_used_where_a_cache_has_no_limit(limits: tuple[str, str], are: bool) -> None:
    assert cpu_products.are_limited(dict(zip(cpu_products.ONEDNN_CACHES, limits, strict=True))) == are
    assert not cpu_products.are_limited({})
