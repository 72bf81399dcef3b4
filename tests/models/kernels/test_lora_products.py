"""Products with LoRA, against the same terms one by one."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.models.kernels import lora_products


@pytest.mark.parametrize("rows", [5, 200, 257, 900])
def test_a_narrow_product_is_shared_among_cores(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shared.append(len(a)) or bmm(a, b))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    numbers = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(rows, 12, generator=numbers)[:, 4:], torch.randn(rows, 40, generator=numbers)
    found = lora_products.narrow_product(narrow, wide)
    torch.testing.assert_close(found, (narrow.double().t() @ wide.double()).float(), rtol=1e-5, atol=1e-4)
    assert shared == {5: [], 200: [], 257: [2], 900: [3]}[rows]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_the_product_is_added_in_place():
    """Inductor makes ``addmm_`` a product into a new tensor, which BLAS fills with a copy of the old one first."""
    from torch._inductor.utils import run_and_get_code

    weight, a, b = torch.randn(96, 64), torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    x = torch.randn(32, 64, requires_grad=True)

    def step(apply: Any) -> Tensor:
        out = apply(x * 2, weight, None, None, a, b, 0.5)
        out.sum().backward()
        return out.detach()

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        out, codes = run_and_get_code(step, torch.compile(lora_products.InPlaceProduct.apply))
    torch.testing.assert_close(out, step(lora_products.InPlaceProduct.apply))
    for code in codes:  # forward and backward
        assert code.count("torch.ops.runner.add_product_.default(buf") == 1
        assert "addmm" not in code
