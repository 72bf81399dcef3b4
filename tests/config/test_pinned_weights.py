"""Weights of another run in the configuration: the digest is part of the signature, the folder is not."""

from __future__ import annotations

from typing import Any

import pytest

from runner.config import pinned_weights
from runner.config.pinned_weights import START, TEACHER

DIGEST = "0123456789abcdef" * 2
TASK = {"_target_": "runner.tasks.distill.distill", "teacher": None}


def test_a_frozen_value_is_a_folder_and_a_digest() -> None:
    folder = "/runs/with@sign\nand a line"
    assert pinned_weights.split(pinned_weights.joined(folder, DIGEST)) == (folder, DIGEST)
    for typed in ("sft", "owner/name@main", f"owner/name@{DIGEST[:31]}", "/runs/sft"):
        assert pinned_weights.split(typed) == (typed, "")


@pytest.mark.parametrize("key", [START, TEACHER])
def test_only_the_digest_is_left_without_the_folder(key: tuple[str, str]) -> None:
    cfg: dict[str, Any] = {"lora": {"r": 8, "start": None}, "task": TASK, "seed": 0}
    assert pinned_weights.of(cfg, key) == ""
    first, second = (pinned_weights.replaced(cfg, f"/{place}@{DIGEST}", key) for place in ("here", "there"))
    assert pinned_weights.of(first, key) == f"/here@{DIGEST}"
    assert pinned_weights.without_folders(first) == pinned_weights.without_folders(second)
    assert pinned_weights.without_folders(first)[key[0]][key[1]] == DIGEST
    on_the_hub = pinned_weights.replaced(cfg, "owner/name@main", key)
    assert pinned_weights.without_folders(on_the_hub)[key[0]][key[1]] == "owner/name@main"


def test_a_configuration_without_them_is_that_of_earlier_versions() -> None:
    earlier = {"lora": {"r": 8}, "task": {"_target_": TASK["_target_"]}, "seed": 0}
    assert pinned_weights.without_folders({"lora": {"r": 8, "start": None}, "task": TASK, "seed": 0}) == earlier
    assert pinned_weights.without_folders(earlier) == earlier


def test_the_key_teacher_of_a_users_own_task_is_the_users() -> None:
    cfg = {"task": {"_target_": "my_lab.distill", "teacher": f"/here@{DIGEST}"}}
    assert pinned_weights.of(cfg, TEACHER) == ""
    assert pinned_weights.without_folders(cfg) == cfg
