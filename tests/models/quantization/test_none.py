"""No quantization: no layer is quantized, loaded or not."""

from __future__ import annotations

import pytest
import torch
from conftest import option
from torch import nn

from runner.models.quantization import none


def test_every_weight_stays_as_it_is() -> None:
    plain = none.none()
    assert (plain, plain.plain, plain.graph_breaks) == (option("quant", "none")(), True, "")
    assert plain.library_config("cpu") is None
    for device in ("cpu", "meta"):
        assert not plain.quantizes(nn.Linear(4, 4, device=device))
    weight = torch.randn(2, 3)
    assert plain.unpack(weight, plain.state(nn.Linear(3, 2)), torch.float32) is weight
    with pytest.raises(AssertionError, match=r"no weight of shape \(2, 3\) is quantized"):
        plain.bytes_of(2, 3)
