"""The metrics of evaluations: names, directions, and keys of ``train`` that cannot take effect."""

from __future__ import annotations

import pytest
from conftest import TINY, composed

from runner.errors import ConfigError
from runner.report import columns
from runner.sweep import algorithms

BEST = ("train.metric_for_best_model=eval/loss", "train.eval_steps=1")
REFUSED = [
    ("train.metric_for_best_model=eval/los train.eval_steps=1", "did you mean 'eval/loss'"),
    ("train.metric_for_best_model=eval/loss", "set it to a number below train.max_steps=2"),
    ("train.metric_for_best_model=eval/loss train.eval_steps=2", "set it to a number below train.max_steps=2"),
    (" ".join(BEST) + " train.greater_is_better=true", "smaller values are better"),
    ("train.early_stopping_patience=2", "has no effect without train.metric_for_best_model"),
    ("train.early_stopping_threshold=0.1", "has no effect without train.metric_for_best_model"),
    ("train.greater_is_better=true", "has no effect without train.metric_for_best_model"),
    (" ".join(BEST) + " train.early_stopping_threshold=0.1", "set train.early_stopping_patience too"),
    ("train.loss_watchdog_patience=2", "has no effect without train.loss_watchdog_threshold"),
    ("task=dpo data=chitchat_pairs train.metric_for_best_model=eval/logps/rejected train.eval_steps=1",
     "set train.greater_is_better to true or false"),
    ("train.metrics=[pass_at_4] train.metric_samples=2", "set train.metric_samples to 4 or more"),
    ("train.metric_samples=2", "has no effect without train.metrics"),
    ("train.metrics=[f1] train.metric_temperature=0.5", "has no effect with train.metric_samples=1"),
    ("train.metrics=[exact_mach]", "is neither built in nor a function did you mean 'exact_match'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "problem"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_take_effect_is_refused(words: str, problem: str):
    with pytest.raises(ConfigError) as caught:
        composed(*TINY, "train.max_steps=2", *words.split())
    (fault,) = caught.value.faults
    assert problem in f"{fault.problem} {fault.remedy}"


def test_the_names_of_metrics_say_what_their_tasks_say():
    for task in (
        "sft",
        "pretrain",
        "dpo",
        "kto",
        "reward",
        "classify",
        "grpo",
        "sft task.loss_type=dft",
        "distill task.teacher=runner/tiny",
    ):
        rewards = ["task.rewards=[functools:reduce]", "data.packing=false"] * (task == "grpo")
        cfg = composed(*TINY, *f"task={task}".split(), *rewards)
        for name, direction in algorithms.logged(cfg).items():
            by_name = "maximize" if columns.by_name(name).is_larger_better else "minimize"
            assert direction in (None, by_name), (task, name)
