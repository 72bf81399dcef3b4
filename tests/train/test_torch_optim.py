"""Any optimizer of torch by name."""

from __future__ import annotations

import pytest
from test_optim import assert_resumes, option, tiny

from runner.errors import ConfigError
from runner.train import optim, torch_optim

NAMES = sorted(set(torch_optim._constructors()) - set(torch_optim.CLOSURE_OR_SPARSE))


@pytest.mark.parametrize("name", NAMES)
def test_any_torch_optimizer_resumes_bit_for_bit(name: str) -> None:
    assert_resumes(option("torch", name=name))


def test_values_that_torch_refuses_are_faults() -> None:
    with pytest.raises(ConfigError, match="SGD: Nesterov momentum requires a momentum"):
        option("torch", name="SGD", nesterov=True)(optim.parameter_groups(tiny(), 0.0))
