"""A lost or damaged state.json or manifest.json: rebuilt, restored, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import DamagedError
from runner.files import copy_of
from runner.tracking import recovery
from runner.tracking.rundir import RunDir


@pytest.mark.parametrize(
    "content",
    ["", '{"status": "runn', "[]", '{"status": "resting"}', '{"speed": 1}', "\udcff",
     '{"status": "failed", "summary": null}', '{"status": "failed", "summary": [1]}',
     '{"status": "killed", "step": "many"}'],
)  # fmt: skip
def test_a_damaged_state_is_named_and_rebuilt_from_the_checkpoints(tmp_path: Path, content: str):
    rundir = RunDir(tmp_path)
    rundir.update_manifest(id="x")
    rundir.state.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedError, match=r"state\.json is damaged") as raised:
        rundir.read_state()
    assert f"resume={tmp_path}" in raised.value.faults[0].remedy
    assert "state.json" in recovery.rebuild_state(rundir)
    assert rundir.read_state().status == "pending", "nothing was trained"

    for step in (3, 12):
        (rundir.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    (rundir.checkpoints / "step-000012" / "progress.json").write_text('{"step": 12, "timing": {"seconds": 7.5}}')
    rundir.state.unlink()
    with pytest.raises(DamagedError, match=r"state\.json is missing"):
        rundir.read_state()
    assert "is missing" in recovery.rebuild_state(rundir)
    state = rundir.read_state()
    assert (state.status, state.step, state.seconds, state.attempt) == ("killed", 12, 7.5, 1)
    assert "checkpoint of step 12" in state.reason
    assert recovery.rebuild_state(rundir) == "", "a sound file is left alone"


def test_a_lost_manifest_is_restored_when_its_run_is_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rundir = RunDir(tmp_path)
    rundir.update_manifest(id="x")
    rundir.manifest.unlink()
    assert rundir.read_manifest() == {"id": "x"}
    assert not rundir.manifest.exists(), "a folder that is being removed is not written to"
    recovery.restore_manifest(rundir)
    assert json.loads(rundir.manifest.read_text()) == {"id": "x"}
    assert "is lost; restored from its copy" in caplog.text
    rundir.config.write_text("seed: 1")
    rundir.checkpoints.mkdir()
    for file in (rundir.manifest, copy_of(rundir.manifest)):
        file.unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json is lost"):
        recovery.restore_manifest(rundir)


def test_a_newer_manifest_than_the_copy_is_kept(tmp_path: Path):
    rundir = RunDir(tmp_path)
    rundir.update_manifest(id="x")
    rundir.manifest.write_text('{"id": "edited"}')
    recovery.restore_manifest(rundir)
    assert rundir.read_manifest() == {"id": "edited"}


def test_the_files_of_a_refused_run_are_removed_with_the_folders_created_for_it(tmp_path: Path):
    day, other = tmp_path / "day", tmp_path / "day" / "other"
    rundir = RunDir(day / "run")
    (rundir.code / "package").mkdir(parents=True)
    rundir.write_state(status="pending")
    rundir.update_manifest(id="x", made_folders=[str(rundir.path), str(day)])
    other.mkdir()
    recovery.discard(rundir)
    assert not rundir.path.exists()
    assert other.exists(), "another run is in that folder"
