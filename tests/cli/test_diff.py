"""diff: two runs side by side."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import re

import pytest
from fixtures.clones import _in_a_new_folder, trained

from runner.cli import main


def test_two_runs_side_by_side(capfd: pytest.CaptureFixture[str]):
    four, eight = trained("four", "lora.r=4"), trained("eight")
    assert main.run(["diff", "four", "eight"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"configuration\n +lora\.r +4 +8\n\n", said), "and no other key"
    assert re.search(r"train/loss +\S+ +\S+  \([+-]", said)
    assert "the same: where and how, code, environment, data, hardware" in said
    assert "the metrics first differ at step 1: train/grad_norm" in said

    trained("coarse", "quant=8bit", "tracking.experiment=other")
    assert main.run(["diff", "eight", "coarse", "--all"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"configuration\n(.+\n)* +quant +none +8bit\n", said), "the option's name"
    assert re.search(r" data\.format +messages +messages\n", said)
    assert "_target_" not in said

    assert main.run(["diff", "four", "eight", "--all"]) == 0
    assert re.search(r"optim\.learning_rate +0\.001 +0\.001", capfd.readouterr().out)
    assert main.run(["diff", "four", "eight", "--markdown"]) == 0
    assert "| lora.r | 4 | 8 |" in capfd.readouterr().out
    assert main.run(["diff", "four", "eight", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["sections"]["configuration"]["lora.r"] == {"values": ["4", "8"], "differs": True}
    assert [run["folder"] for run in told["runs"]] == [str(four.path), str(eight.path)]
    assert (told["files"], told["numbers"]["steps"]) == ([], 4)
