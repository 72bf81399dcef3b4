"""Hydra's errors in the words of this program."""

from __future__ import annotations

import pytest
from conftest import TINY, composed
from fixtures.composed_jobs import jobs_of

from runner.errors import ConfigError


def test_a_key_that_only_the_swept_options_have():
    jobs = jobs_of(["quant=4bit,fp4", "quant.double=false", "seed=1,2"])
    assert [job.cfg["quant"]["double"] for job in jobs] == [False] * 4
    for order in ("none,4bit", "4bit,none"):
        with pytest.raises(ConfigError, match=r"quant\.double=false: no such key with quant=none"):
            jobs_of([f"quant={order}", "quant.double=false"])


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
