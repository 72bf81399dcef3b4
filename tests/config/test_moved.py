"""Runs of version 0.1.0, whose configurations name options by the modules of that time: one of them is a fixture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from runner.cli import main
from runner.config import bind, moved
from runner.tracking import manifest
from runner.tracking.rundir import RunDir

RUN = Path(__file__).parents[1] / "fixtures" / "run-0.1.0"


@pytest.fixture
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> RunDir:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUN, tmp_path / "outputs" / "old")
    return RunDir(tmp_path / "outputs" / "old")


def test_a_run_of_the_first_version_keeps_its_signature(rundir: RunDir) -> None:
    frozen = yaml.safe_load(rundir.config.read_text())
    cfg = manifest.read_config(rundir)
    assert frozen["model"]["_target_"] == "runner.origins.random"
    assert cfg["model"]["_target_"] == "runner.models.sources.random"
    assert manifest.signature(cfg) == rundir.read_manifest()["signature"] == "e936f02ff4af81a7"


def test_every_option_of_the_first_version_is_still_an_option() -> None:
    names = [line.split()[-1] for line in (RUN / "options.txt").read_text().splitlines()]
    assert len(names) == 46
    for name in names:
        today = moved.target_today(name)
        assert callable(bind.bind_target({"_target_": today})), name
        assert moved.to_first({"group": {"_target_": today}}) == {"group": {"_target_": name}}


def test_it_is_compared_exported_and_rerun(rundir: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["compare", "outputs/old", "--json", "--where", "model=tiny"]) == 0
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    assert run["eval/loss"] == pytest.approx(5.48961159)
    assert main.run(["export", "outputs/old", "model", "--merged"]) == 0
    assert Path("model/model.safetensors").is_file()
    assert main.run(["rerun", "outputs/old", "hydra.run.dir=again", "tracking=offline"]) == 0
    again = RunDir(Path("again").absolute())
    assert again.read_manifest()["signature"] == "e936f02ff4af81a7"
    assert yaml.safe_load(again.config.read_text())["model"]["_target_"] == "runner.models.sources.random"
