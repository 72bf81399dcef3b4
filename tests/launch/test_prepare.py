"""Jobs before their folders are written: which launcher starts them, and how many processes each has."""

from __future__ import annotations

from conftest import TINY, composed

from runner.launch import prepare
from runner.launch.local.accelerate import Elastic
from runner.launch.local.launcher import Local


def test_configurations_are_grouped_by_their_launcher() -> None:
    two = ("launcher=accelerate", "launcher.processes=2")
    configs = [composed(*TINY, *words) for words in ((), two, ("seed=1",), ("launcher.threads=2",))]
    groups = prepare.by_launcher(configs)
    assert [numbers for _, numbers in groups] == [[0, 2], [1], [3]]
    assert [type(launcher) for launcher, _ in groups] == [Local, Elastic, Local]
    assert [cfg["parallel"].get("processes") for cfg in configs] == [None, 2, None, None]
