"""The verb plan: what it shows, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY
from test_main import configuration

from runner.cli import main
from runner.tracking import manifest

QUICK = (*TINY, "train.max_steps=2")


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNNER_TRACEBACK", raising=False)


def test_the_plan_shows_what_would_happen_and_writes_nothing(capfd: pytest.CaptureFixture[str]):
    assert main.run(["plan", *QUICK]) == 0
    said = capfd.readouterr().out
    for word in ("parameters", "memory, GiB", "weights", "rows read", "% of the token slots are used", "steps", "⟦"):
        assert word in said, word
    assert not Path("outputs").exists()


def test_the_plan_of_a_run_is_that_of_its_own_configuration(capfd: pytest.CaptureFixture[str]):
    manifest.create(configuration(*QUICK), Path("mine"), [], [])
    assert main.run(["plan", "resume=mine"]) == 0
    assert "random-64x2" in capfd.readouterr().out


def test_the_plan_has_each_way_of_launching(capfd: pytest.CaptureFixture[str]):
    words = ["launcher=slurm", "launcher.cluster=local", "launcher.tasks_per_node=1,2", "seed=1,2"]
    assert main.run(["plan", "-m", *QUICK, *words]) == 0
    said = capfd.readouterr().out
    assert said.count("random-64x2") == 4
    launches = [line for line in said.splitlines() if "this machine" in line]
    assert len(launches) == 2, said


def test_a_model_that_cannot_fit_is_refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from runner.train.memory import usage

    monkeypatch.setattr(usage, "of_device", lambda *_: (2**20, 2**20))
    for words in (["plan", *QUICK], list(QUICK)):
        assert main.run(words) == 2
        said = capfd.readouterr().err
        assert "GiB, but the device has 0.0 GiB" in said
        assert "quant=4bit" in said
    assert not Path("outputs").exists()
