"""A group is called by the option that was chosen."""

from __future__ import annotations

from fixtures.results import config

from runner.config import choices


def test_a_group_is_named_by_the_option_that_was_chosen():
    changed, implied = choices.named(config(quant__compute_dtype="float32"), {"quant": "4bit"})
    assert changed["quant"] == "4bit"
    assert "quant._target_" not in changed
    assert implied == {"quant.kind", "quant.double"}
    pretrained = {"model._target_": "runner.models.sources.pretrained", "model.path": "/mine", "model.revision": "null"}
    assert choices.named(pretrained, {"model": "qwen"})[0]["model"] == "qwen"
    assert choices.named({"optim._target_": "my_lab.my_sgd", "optim.lr": "1"}, {"optim": "mine"})[0]["optim"] == "mine"


def test_a_run_of_the_first_version_is_named_by_its_overrides_or_the_function():
    old = {
        "quant._target_": "runner.quant.four_bit",
        "lora._target_": "runner.lora.lora",
        "task._target_": "runner.tasks.sft",
    }
    found, _ = choices.named(old, choices.of_overrides(["quant=fp4", "lora.r=8"]))
    assert found == {"quant": "fp4", "lora": "lora", "task": "sft"}
