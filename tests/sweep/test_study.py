"""Which runs a study may contain, and what it records of them."""

# ruff: noqa: F401, F811 - fixtures are imported and requested by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures.searches import play, study_of
from test_search import SMALL

from runner.tracking.sweepdir import SweepDir


def test_a_search_goes_on_only_with_runs_that_can_be_compared(play: Any, capsys: pytest.CaptureFixture[str]):
    assert play(*SMALL) == (0, 2)
    for words, told in [
        (("train.max_steps=300",), "train.max_steps=60 (now 300)"),
        (("model=smollm2", "search.trials=3"), "(now runner.models.sources.gguf)"),
        (("lora=dora",), "lora.use_dora"),
        (("seed=1",), "seed=0 (now 1)"),
    ]:
        assert play(*SMALL, *words) == (2, 0), words
        said = capsys.readouterr().err
        assert told in said
        assert "or start a new one with sweep=NAME" in said
    same = ("search.trials=4", "tracking=offline", "launcher.parallel=2", "retry=true", "name=other")
    assert play(*SMALL, *same) == (0, 2)


def test_a_search_that_noted_nothing_of_its_runs_goes_on(play: Any):
    assert play(*SMALL) == (0, 2)
    study = study_of(SweepDir(Path("outputs/sweeps/it")))
    about = study.user_attrs["about"]
    study.set_user_attr("about", {key: about[key] for key in ("space", "objectives")})
    assert play(*SMALL, "search.trials=3") == (0, 1)
    assert play(*SMALL, "train.max_steps=300") == (2, 0), "from then on it is noted"
