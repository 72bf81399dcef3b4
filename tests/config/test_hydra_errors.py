"""Hydra's errors in the words of this program."""

from __future__ import annotations

import pytest
from fixtures.composed_jobs import jobs_of

from runner.errors import ConfigError


def test_a_key_that_only_the_swept_options_have():
    jobs = jobs_of(["quant=4bit,fp4", "quant.double=false", "seed=1,2"])
    assert [job.cfg["quant"]["double"] for job in jobs] == [False] * 4
    for order in ("none,4bit", "4bit,none"):
        with pytest.raises(ConfigError, match=r"quant\.double=false: no such key with quant=none"):
            jobs_of([f"quant={order}", "quant.double=false"])
