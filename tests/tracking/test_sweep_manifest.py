"""A sweep whose sweep.json is lost or damaged with its copy is rebuilt from its runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from runner.errors import DamagedError
from runner.files import copy_of
from runner.sweep import folder
from runner.tracking import sweep_manifest
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

COMMAND = ["python", "-m", "runner", "-m", "lora.r=8,16"]


def a_sweep(path: Path) -> SweepDir:
    """A sweep of two runs, one in a folder of the user's naming, and a run of something else below it."""
    jobs = {"aa": {"folder": "000-aa", "label": "lora.r=8"}, "bb": {"folder": "mine/r16", "label": "lora.r=16"}}
    sweep = SweepDir(path)
    sweep.update(id="1", name="ranks", created=5.0, commands=[COMMAND], jobs=jobs)
    for number, (signature, job) in enumerate(jobs.items()):
        rundir = RunDir(path / job["folder"])
        stored = {"run_id": signature, "uri": "sqlite:///m.db", "parent_run_id": "p"}
        notes = {"sweep": "ranks", "label": job["label"], "command": COMMAND, "mlflow": stored}
        rundir.update_manifest(signature=signature, created=5.0 + number, **notes)
    RunDir(path / "zzz").update_manifest(signature="cc", created=1.0)
    return sweep


def damage(sweep: SweepDir, text: str | None) -> None:
    for file in (sweep.manifest, copy_of(sweep.manifest)):
        file.unlink() if text is None else file.write_text(text)


def test_a_damaged_file_is_rebuilt_from_the_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = a_sweep(tmp_path / "ranks")
    before = sweep.read()
    damage(sweep, "{")
    with caplog.at_level(logging.WARNING):
        assert [rundir.path.name for rundir in sweep.rundirs()] == ["000-aa", "r16"]
    assert caplog.text.count("rebuilt from the manifests of its 2 runs") == 1
    after = json.loads(sweep.manifest.read_text())
    assert {
        **before,
        "id": after["id"],
        "is_rebuilt": True,
        "mlflow": {"parent_run_id": "p", "uri": "sqlite:///m.db"},
    } == after
    assert sweep.command() == "python -m runner -m lora.r=8,16"
    caplog.clear()
    assert (sweep.read(), caplog.text) == (after, ""), "once"


def test_a_lost_file_is_rebuilt_before_the_command_continues_the_sweep(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path / "ranks")
    jobs = sweep.read()["jobs"]
    damage(sweep, None)
    assert sweep.read() == {}, "a folder without sweep.json is no sweep, until the command is repeated"
    folder.refuse(sweep)
    assert sweep.read()["jobs"] == jobs


def test_without_runs_that_tell_of_it_a_damaged_file_stays_damaged(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path / "ranks")
    damage(sweep, "{")
    for name in ("000-aa", "mine/r16"):
        for file in (RunDir(sweep.path / name).manifest, copy_of(RunDir(sweep.path / name).manifest)):
            file.write_text("{")
    with pytest.raises(DamagedError, match="restore it"):
        sweep.read()
    assert sweep.manifest.read_text() == "{"


def test_swept_values_are_those_of_the_command() -> None:
    jobs = {"a": {"label": "lora.target_modules=[q,v],+x.y=1"}, "b": {"label": "lora.target_modules=[k],+x.y=2"}}
    swept = sweep_manifest.swept({"jobs": jobs, "commands": ["runner -m +x.y=1,2 experiment=e"]})
    assert swept == {"lora.target_modules": "[q,v], [k]", "x.y": "1,2"}
    search = {
        "jobs": {"a": {"label": "optim.learning_rate=0.001"}},
        "commands": [["optim.learning_rate=interval(0,1)"]],
    }
    assert sweep_manifest.swept(search) == {"optim.learning_rate": "interval(0,1)"}
