"""Operations and passes over memory of a decoder layer: a change that adds some has to be seen here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import versions

from runner.train import estimate

FILE = Path(__file__).parents[2] / "scripts" / "bench" / "layer_counts.py"
KNOWN = {"8b-lora": (188, 275), "1b-full": (129, 302)}
"""Case → (operations, passes over the hidden states). Lower them where a change lowers them."""


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("layer_counts", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layer_counts"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", KNOWN)
@versions.by_document
def test_a_layer_has_no_more_operations_and_passes_than_it_had(case: str, bench: Any) -> None:
    shape, options = bench.CASES[case]
    layer = bench.of_layer(shape, **options)
    most_operations, most_passes = KNOWN[case]
    assert layer.operations.total() <= most_operations, layer.operations
    assert layer.passes(shape["hidden_size"]) <= most_passes + 0.5, layer.bytes
    if case == "8b-lora":
        assert layer.operations.total() == pytest.approx(estimate.OPERATIONS_OF_LAYER, rel=0.05)
        # forward and input gradient of all products, the gradients of A and B, and nothing twice
        weights = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
        assert layer.flops == pytest.approx(4 * weights * bench.ROWS * bench.LENGTH, rel=0.02)
