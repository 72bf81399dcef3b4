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


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["+experiment=smoke"], "+experiment", "write experiment=…, without +"),
        (["~train.eval_steps"], "~train.eval_steps", "set train.eval_steps=null"),
        (["hydra/sweeper=optuna"], "hydra/sweeper=optuna", "-m search=tpe"),
        (["-cn", "mine"], "--config-name mine", "experiment=NAME"),
        (["train.warmup_steps=10"], "train.warmup_steps", "did you mean schedule.warmup_steps?"),
        (["+train.warmup_steps=10"], "train.warmup_steps", "did you mean schedule.warmup_steps?"),
        (["+task.temperature=1"], "task.temperature", "keys here: "),
    ],
)
def test_habits_of_hydras_users_are_answered(words: list[str], key: str, remedy: str):
    with pytest.raises(ConfigError) as refused:
        composed(*TINY, *words)
    (fault,) = refused.value.faults
    assert fault.key == key
    assert remedy in fault.remedy
