"""Overrides that Hydra cannot read: which one it is, and how it is written."""

from __future__ import annotations

import pytest
from conftest import TINY, composed

from runner.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("data.where=level>0", "quote the value: \"data.where='level>0'\""),
        ("data.where=lang=en and x=1", "quote the value: \"data.where='lang=en and x=1'\""),
        ("name=it's", "quote the value: name='…'"),
    ],
)
def test_a_value_that_needs_quotes_is_named(override: str, remedy: str):
    with pytest.raises(ConfigError) as refused:
        composed(*TINY, override, "train.max_steps=3")
    (fault,) = refused.value.faults
    key, _, value = override.partition("=")
    assert (fault.key, fault.value, fault.remedy) == (key, value, remedy)
    assert fault.problem.startswith("cannot be read (")
