"""Two runs compared, from what is recorded of them."""

from __future__ import annotations

import math

from runner.report import diff
from runner.report.record import Recorded
from runner.tracking.mlflow import store


def test_numbers_are_compared_as_they_are():
    nan, step = math.nan, {0: 1.0, 1: 2.0}
    assert diff.numbers({"train/loss": {1: nan}}, {"train/loss": {1: nan}}).first is None
    assert diff.numbers({"train/loss": {1: nan}}, {"train/loss": {1: math.inf}}).first is not None
    assert diff.numbers({"train/loss": {1: math.inf}}, {"train/loss": {1: store.INFINITY}}).first is None
    assert diff.numbers({"train/loss": step}, {"train/loss": {0: 1.0}}).steps == 1
    assert diff.numbers({"train/mfu": {1: 0.1}}, {"train/mfu": {1: 0.2}}).steps == 0, "speed is no result"
    found = diff.numbers({"train/loss": step, "eval/loss": {1: 5.0}}, {"train/loss": step, "eval/loss": {1: 4.0}})
    assert (found.first, found.largest, found.last) == ((1, "eval/loss", 5.0, 4.0), 1.0, 1)


def run(name: str, *, is_dirty: bool = False, **config: object) -> Recorded:
    option = {"_target_": "runner.models.lora.lora", "r": 8}
    git = {"sha": "c0ffee", "dirty": is_dirty, "diff_sha256": "d" * 64 if is_dirty else None}
    manifest = {"git": git, "versions": {"torch": "2.5.1"}, "choices": {"lora": "lora"}}
    curves = {"eval/loss": {0: 0.5, 1: 3.0, 2: 2.0}, "train/mfu": {1: 0.25}, "train/loss": {1: 1.0, 2: 0.75}}
    return Recorded(name, name, {"seed": 0, "lora": option, **config}, manifest, "completed", curves)


def test_what_is_computed_stands_apart_from_where() -> None:
    sections = diff.of(run("a", outputs_dir="/x"), run("b", outputs_dir="/y", seed=1, is_dirty=True, extra=True))
    differing = {each.title: [row.key for row in each.rows if row.differs] for each in sections if each.differs}
    assert differing == {
        "configuration": ["seed", "extra"], "where and how": ["outputs_dir"], "code": ["uncommitted changes"],
    }  # fmt: skip
    rows = {row.key: (row.ours, row.theirs) for section in sections for row in section.rows}
    assert rows["seed"] == ("0", "1")
    assert rows["extra"] == ("", "true"), "one that only one run has"
    assert (rows["lora"], rows["outputs_dir"]) == (("lora", "lora"), ("/x", "/y"))
    assert rows["uncommitted changes"] == ("none", "yes (dddddddddddd)")
    assert rows["eval/loss (best)"] == ("2.0", "2.0"), "the evaluation before training is none of them"
    assert (rows["eval/loss"], rows["train/mfu"]) == (("2.0", "2.0"), ("0.25", "0.25"))
    assert "digest" not in [row.key for section in sections if section.title == "code" for row in section.rows]
