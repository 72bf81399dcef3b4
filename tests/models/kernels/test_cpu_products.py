"""Products by oneDNN: what they compute, and where they are used."""

from __future__ import annotations

import functools
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


def test_a_linear_layer_has_the_gradients_of_pytorch() -> None:
    layer, x = torch.nn.Linear(300, 260), torch.randn(2, 128, 300, requires_grad=True)
    grad, found = torch.randn(2, 128, 260), []
    for forward in (functools.partial(cpu_products.linear, layer), layer):
        out = forward(x)
        found.append([out, *torch.autograd.grad(out, [x, layer.weight, layer.bias], grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    layer.weight.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(cpu_products.linear(layer, x), x, grad)[0], found[0][1])


def test_layers_without_adapter_are_replaced_where_it_is_used() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = model(x)
    assert cpu_products.install(model) == 2 * cpu_products.is_used()
    assert torch.equal(model(x), expected), "small products are not oneDNN's"
    assert not cpu_products.install(model), "nothing is replaced twice"
