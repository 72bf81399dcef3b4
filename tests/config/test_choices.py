"""A group is called by the option that was chosen."""

from __future__ import annotations

import datetime

from fixtures import results

from runner.config import bind, choices


def test_a_group_is_named_by_the_option_that_was_chosen():
    changed, implied = choices.named(results.config(quant__compute_dtype="float32"), {"quant": "4bit"})
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


def test_runs_share_the_names_of_equal_groups_and_of_no_others():
    quant = {"_target_": "runner.models.quantization.bitsandbytes.four_bit", "bits": [4, True, None], "code": ""}
    config = {"seed": 1, "empty": {}, "quant": quant, "data": {"format": {"_target_": "runner.data.formats.text"}}}
    chosen = {"quant": "fp4", "data.format": "text"}
    others = [
        (config, {**chosen, "quant": "4bit"}),
        ({**config, "seed": True}, chosen),
        ({**config, "seed": 1.0}, chosen),
        ({**config, "seed": "1"}, chosen),
        ({**config, "quant": {**quant, "bits": [4, 1, None]}}, chosen),
        ({**config, "seed": datetime.date(2026, 11, 30)}, chosen),
    ]
    for tree, names in [(config, chosen), *others, (config, chosen)]:
        expected = choices.named(dict(bind.flatten(tree)), names)
        assert choices.of_config(tree, names) == expected
        assert list(choices.of_config(tree, names)[0]) == list(expected[0]), "the order of the configuration"
