"""Keys without effect on the jobs of a command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY

from runner.cli import main

QUICK = (*TINY, "train.max_steps=2")


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNNER_TRACEBACK", raising=False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["-m", "seed=1,2", "resume=outputs/x"], "this command starts several"),
        (["hydra.job.chdir=true"], "has no effect here"),
        (["hydra/launcher=basic"], "has no other option here"),
        (["--experimental-rerun", "x"], "is not for this program"),
        (["hydra.run.dir=/proc/nothing/here"], "cannot be written"),
        (["resume=outputs/x", "hydra.run.dir=y"], "stays in its folder"),
    ],
)
def test_what_would_have_no_effect_is_refused(overrides: list[str], said: str, capfd: pytest.CaptureFixture[str]):
    assert main.run([*QUICK, *overrides] if "resume=outputs/x" not in overrides else overrides) == 2
    assert said in capfd.readouterr().err
    assert not Path("outputs").exists()
