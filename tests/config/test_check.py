"""Every fault of a configuration, before anything is written."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from fixtures.composed_jobs import jobs_of

from runner.config import bind, check


@functools.cache
def composed() -> dict[str, Any]:
    (job,) = jobs_of(["model=tiny", "tracking=offline"])
    return job.cfg


def faults(**changes: Any) -> list[str]:
    """The faults with other values: ``train__max_steps=3``; ``...`` removes the key."""
    cfg = copy.deepcopy(composed())
    for path, value in changes.items():
        *groups, key = path.split("__")
        node = functools.reduce(lambda inner, group: inner[group], groups, cfg)
        if value is ...:
            del node[key]
        else:
            node[key] = value
    return [str(fault) for fault in check.faults_of(cfg)]


def test_what_is_right_has_no_fault() -> None:
    assert faults() == []


@pytest.mark.parametrize(
    ("changes", "starts", "remedy"),
    [
        ({"sead": 1}, "sead=1: no such key. did you mean 'seed'?", "keys here: "),
        ({"seed": ...}, "seed: is missing", "give it a value: a whole number >= 0"),
        ({"lora": "none"}, "lora=none: must be a group of keys", "choose an option with lora=…"),
        ({"data__format": "alpaca"}, "data.format=alpaca: is a group of keys", "choose the format with data/format="),
        ({"data__max_seq_len": 3}, "data.max_seq_len=3: no such key", "did you mean data.max_length?"),
        ({"name": "hf_" + "a1B2c3D4" * 3}, "name: looks like a secret", "put it into the environment"),
        ({"train__micro_batch_size": 3, "train__per_device_batch_size": 8}, "train.micro_batch_size=3: does not divide",
         "use one of 1, 2, 4, 8, or auto"),
        ({"train__max_steps": None}, "train: no stopping criterion", "set one of train.max_steps, "),
        ({"train__num_train_epochs": 1, "train__max_tokens": 9},
         "train: has 3 stopping criteria, and can have one: train.max_steps, train.num_train_epochs, train.max_tokens",
         "set the others to null: train.max_steps=null train.num_train_epochs=null"),
    ],
)  # fmt: skip
def test_a_fault_names_key_value_and_remedy(changes: dict[str, Any], starts: str, remedy: str) -> None:
    (fault,) = faults(**changes)
    assert fault.startswith(starts)
    assert remedy in fault


def test_combinations_are_checked_once_the_single_values_are_right() -> None:
    first = faults(seed=-1, train__max_steps=None, lora__r="x")
    assert [each.partition("=")[0] for each in first] == ["seed", "lora.r"]
    assert faults(train__max_steps=None)[0].startswith("train: no stopping criterion")


def test_groups_that_jobs_share_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, checked, original = jobs_of(["model=tiny", "lora.r=4,8", "seed=1,2"]), list[str](), bind.find_faults

    def counted(node: Any, key: str = "", target: Any = None) -> Any:
        checked.append(key)
        return original(node, key, target)

    monkeypatch.setattr(bind, "find_faults", counted)
    known: check.Known = {}
    assert [check.faults_of(job.cfg, known) for job in jobs] == [[]] * 4
    assert (checked.count("model"), checked.count("lora")) == (1, 2)
    jobs[3].cfg["lora"]["r"] = 0
    assert "lora.r=0" in str(check.faults_of(jobs[3].cfg, known)[0])
