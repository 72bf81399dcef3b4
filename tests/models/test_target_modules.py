"""Names of target modules: as PEFT matches them; one that matches nothing is told with what there is."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from runner.models import target_modules


def model() -> nn.Module:
    block = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


@pytest.mark.parametrize("names", ["all-linear", ["q_proj"], ["layers.0.q_proj", "norm"], r".*\.q_proj", None])
def test_names_that_match_are_right(names: Any) -> None:
    assert list(target_modules.faults(model(), {"target_modules": names})) == []


@pytest.mark.parametrize(
    ("names", "value"), [(["q_proj", "proj"], "proj"), ("q_proj", "q_proj"), (["layers.1.q_proj"], "layers.1.q_proj")]
)
def test_a_name_is_a_suffix_of_whole_parts_and_an_expression_the_whole_name(names: Any, value: str) -> None:
    (fault,) = target_modules.faults(model(), {"exclude_modules": names})
    assert (fault.key, fault.value, fault.problem) == ("exclude_modules", value, "matches no module of this model")
    assert "linear modules: q_proj; or all-linear" in fault.remedy


def test_a_broken_expression_is_named() -> None:
    (fault,) = target_modules.faults(model(), {"target_modules": "("})
    assert fault.problem.startswith("is not a valid regular expression")
