"""Which keys of a rerun may differ from the original run."""

from __future__ import annotations

from typing import Any

import pytest

from runner.cli import rerun_keys
from runner.errors import ConfigError
from runner.report.record import Recorded

CONFIG: dict[str, Any] = {"model": {"path": "here"}, "lora": {"r": 8}, "train": {"max_steps": 3}, "seed": 1,
                          "data": {"sources": {"a": {"path": "rows.jsonl"}}}}  # fmt: skip
RUN = Recorded("first", "first", CONFIG, {"overrides": ["model=tiny", "lora.r=8", "resume=auto"]})


def test_where_and_how_a_run_is_repeated_may_change() -> None:
    where = ["outputs_dir=x", "name=again", "launcher=slurm", "launcher.partition=gpu", "tracking.experiment=mine"]
    rerun_keys.refuse_changes(RUN, [*where, "model.path=there", "data.sources.a.path=there.jsonl"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["lora.r=16", "seed=3"], "start a new run: python -m runner model=tiny lora.r=16 seed=3"),
        (["train.maxsteps=1"], "did you mean 'max_steps'"),
        (["quant=4bits"], "did you mean '4bit'"),
        (["trian.max_steps=1", "seed=3"], "did you mean 'train'"),
        (["resume=auto"], "resume=auto: has no effect on a rerun"),
        (["quant=4bit", "retry=true"], "retry=true: has no effect"),
    ],
)
def test_what_changes_the_result_or_has_no_effect_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rerun_keys.refuse_changes(RUN, words)
    assert problem in str(caught.value)
