"""The run folder: its state and manifest, and locks that die with their holder."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.errors import DamagedError
from runner.files import copy_of
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State


def test_state_starts_pending_and_changes_field_by_field(tmp_path: Path):
    rundir = RunDir(tmp_path)
    assert rundir.read_state() == State()
    rundir.write_state(status="running", step=3)
    state = rundir.write_state(step=4)
    assert (state.status, state.step) == ("running", 4)
    assert rundir.read_state() == state


def _add(folder: Path, key: str) -> None:
    for number in range(20):
        RunDir(folder).update_manifest(**{f"{key}{number}": number})


@pytest.mark.unmeasured
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
