"""Overrides that cannot be read or change nothing are refused."""

from __future__ import annotations

import pytest
from fixtures.composed_jobs import jobs_of

from runner.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "told"),
    [("hydra/launcher=basic", "launcher=local"), ("hydra.job.chdir=true", "has no effect here"),
     ("hydra.callbacks.x.y=1", "hydra.callbacks")],
)  # fmt: skip
def test_keys_of_hydra_without_effect_are_refused(override: str, told: str):
    with pytest.raises(ConfigError, match=told):
        jobs_of(["seed=1,2", override])


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["lora.r=range(9,4)"], r"lora\.r=range\(9,4\): has no values"), (["quant=glob(x*)"], "quant=.*: has no values"),
     (["lora.r=glob(*)"], r"lora\.r=.*: has no values"), (["seed=range(1,1000000000)"], "more than 10,000"),
     (["seed=range(1,102)", "lora.r=range(1,101)"], "more than 10,000 combinations"),
     (["lora.r=4,8", "lora.r=16"], r"lora\.r=4,8: is set twice"),
     (["quant=none,4bit", "+quant=8bit"], "quant=none,4bit: is set twice")],
)  # fmt: skip
def test_a_grid_has_values_each_once_and_not_too_many(words: list[str], problem: str):
    with pytest.raises(ConfigError, match=problem):
        jobs_of(words)


def test_parameters_of_our_own_sweeper_are_refused():
    for word in ('+hydra.sweeper.params={seed:"1,2"}', "hydra.sweeper.params.seed=1"):
        with pytest.raises(ConfigError, match="write the keys and their values themselves"):
            jobs_of(["lora.r=4,8", word])


@pytest.mark.parametrize(
    "word",
    ["hydra.output_subdir=../..", "hydra.output_subdir=.", "hydra.output_subdir=", "hydra.sweep.subdir=../..",
     "hydra.sweep.subdir=/x", "hydra.sweep.dir=", "hydra.run.dir="],
)  # fmt: skip
def test_paths_of_hydra_stay_in_their_folder(word: str):
    key = word.partition("=")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=key):
        jobs_of(["seed=1,2", word, "data=local", "data.path=../x"])


@pytest.mark.parametrize(
    ("word", "problem"),
    [("seed=" + "9" * 5000, "more than 400 digits"), ("seed=" + "[" * 3000, "levels deep"),
     ("name=\udcff", "not UTF-8"),
     ("name=\x1b[31m", "control characters"), ("quant=[4bit,fp4]", "not a list"), ("~tracking", "cannot be removed"),
     ("quant=", "name of one option"), ("experiment=", "name of one option"), ("hydra={}", "as a whole"),
     ("experiment=null", "name of one option"), ("=4", "no key before ="), ("+=4", "no key before ="),
     ("--package=lora", "no effect without --cfg"), ("--resolve", "no effect without --cfg"),
     ("+quant._code_=[x.py]", "cannot be set"), ("+_code_=[x.py]", "cannot be set")],
)  # fmt: skip
def test_words_that_are_no_overrides_are_refused(word: str, problem: str):
    with pytest.raises(ConfigError, match=problem) as caught:
        jobs_of(["seed=1,2", word])
    str(caught.value).encode()
