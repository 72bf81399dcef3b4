"""The run folder: atomic writes, locks that die with their holder, and state that survives."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.errors import DamagedError
from runner.files import cache_dir, copy_of, write_atomic
from runner.tracking.rundir import RunDir, State, find_runs


def test_state_starts_pending_and_changes_field_by_field(tmp_path: Path):
    rundir = RunDir(tmp_path)
    assert rundir.read_state() == State()
    rundir.write_state(status="running", step=3)
    state = rundir.write_state(step=4)
    assert (state.status, state.step) == ("running", 4)
    assert rundir.read_state() == state


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _add(folder: Path, key: str) -> None:
    for number in range(20):
        RunDir(folder).update_manifest(**{f"{key}{number}": number})


def test_concurrent_updates_of_the_manifest_lose_nothing(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(tmp_path, key)) for key in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(RunDir(tmp_path).read_manifest()) == 60


def test_a_folder_is_alive_only_while_its_holder_is(tmp_path: Path):
    rundir = RunDir(tmp_path)
    assert not rundir.is_alive()
    code = f"import time\nfrom pathlib import Path\nfrom runner.tracking.rundir import RunDir\n\
with RunDir(Path({str(tmp_path)!r})).held() as mine:\n    print(mine, flush=True)\n    time.sleep(900)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    assert rundir.is_alive()
    with rundir.held() as mine:
        assert not mine
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    time.sleep(0.05)
    assert not rundir.is_alive()
    with rundir.held() as mine:
        assert mine


def test_the_cache_moves_with_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "c"))
    assert cache_dir("models") == tmp_path / "c" / "models"
    assert cache_dir("models").is_dir()


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
    assert "state.json" in rundir.rebuild_state()
    assert rundir.read_state().status == "pending", "nothing was trained"

    for step in (3, 12):
        (rundir.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    (rundir.checkpoints / "step-000012" / "progress.json").write_text('{"step": 12, "timing": {"seconds": 7.5}}')
    rundir.state.unlink()
    with pytest.raises(DamagedError, match=r"state\.json is missing"):
        rundir.read_state()
    assert "is missing" in rundir.rebuild_state()
    state = rundir.read_state()
    assert (state.status, state.step, state.seconds, state.attempt) == ("killed", 12, 7.5, 1)
    assert "checkpoint of step 12" in state.reason
    assert rundir.rebuild_state() == "", "a sound file is left alone"


@pytest.mark.parametrize("content", ["", '{"id": "x', "[]", "null", "\x00" * 40])
def test_a_damaged_manifest_is_restored_from_its_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str):
    rundir = RunDir(tmp_path)
    rundir.update_manifest(id="x", name="before")
    rundir.manifest.write_text(content)
    assert rundir.read_manifest() == {"id": "x", "name": "before"}
    assert "manifest.json is damaged" in caplog.text
    assert json.loads(rundir.manifest.read_text()) == {"id": "x", "name": "before"}
    rundir.manifest.write_text(content)
    assert rundir.update_manifest(name="after") == {"id": "x", "name": "after"}
    assert json.loads(rundir.manifest.read_text()) == json.loads(copy_of(rundir.manifest).read_text())


def test_a_manifest_damaged_like_its_copy_is_named_and_never_overwritten(tmp_path: Path):
    rundir = RunDir(tmp_path)
    for file in (rundir.manifest, copy_of(rundir.manifest)):
        file.write_text('{"id": "x')
    with pytest.raises(DamagedError, match=r"(?s)manifest\.json is damaged.*its log and model. can still be used"):
        rundir.update_manifest(name="y")
    assert rundir.manifest.read_text() == '{"id": "x'


def test_a_lost_manifest_is_restored_when_its_run_is_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rundir = RunDir(tmp_path)
    rundir.update_manifest(id="x")
    rundir.manifest.unlink()
    assert rundir.read_manifest() == {"id": "x"}
    assert not rundir.manifest.exists(), "a folder that is being removed is not written to"
    rundir.restore_manifest()
    assert json.loads(rundir.manifest.read_text()) == {"id": "x"}
    assert "is lost; restored from its copy" in caplog.text
    rundir.config.write_text("seed: 1")
    rundir.checkpoints.mkdir()
    for file in (rundir.manifest, copy_of(rundir.manifest)):
        file.unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json is lost"):
        rundir.restore_manifest()


def test_a_newer_manifest_than_the_copy_is_kept(tmp_path: Path):
    rundir = RunDir(tmp_path)
    rundir.update_manifest(id="x")
    rundir.manifest.write_text('{"id": "edited"}')
    rundir.restore_manifest()
    assert rundir.read_manifest() == {"id": "edited"}


def test_artifacts_of_mlflow_are_no_runs(tmp_path: Path):
    RunDir(tmp_path / "mlartifacts" / "0" / "artifacts").update_manifest(id="copy")
    rundir = RunDir(tmp_path / "run")
    rundir.update_manifest(id="x")
    assert find_runs(tmp_path) == [rundir]
