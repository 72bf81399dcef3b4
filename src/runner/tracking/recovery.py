"""Recover a run folder: rebuild a lost state.json, restore a lost manifest.json, remove the files of a refused run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from runner.errors import DamagedError, Fault
from runner.files import copy_of, restore_lost
from runner.tracking import state_file
from runner.tracking.rundir import PROGRESS, WITHOUT_MANIFEST, RunDir
from runner.tracking.state_file import State


def rebuild_state(rundir: RunDir) -> str:
    """Write a new state.json from the checkpoints if the file is lost or damaged; returns what was wrong with it.

    Only without a worker. The rebuilt status is killed, or pending without a trace of training.
    """
    try:
        rundir.read_state()
        return ""
    except DamagedError as error:
        problem = error.faults[0].problem
    step, seconds = rundir.saved_step(), 0.0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads((rundir.checkpoints / f"step-{step:06d}" / PROGRESS).read_text())
        seconds = float(saved["timing"]["seconds"])
    state = State()
    if step or rundir.metrics.exists():
        source = f"the checkpoint of step {step}" if step else "metrics.jsonl"
        reason = f"state.json was lost or damaged; rebuilt from {source}"
        started = rundir.metrics.stat().st_ctime - seconds if rundir.metrics.exists() else 0.0
        state = State("killed", step, attempt=1, reason=reason, started=started, seconds=seconds)
    state_file.write(rundir.state, state)
    return problem


def restore_manifest(rundir: RunDir) -> None:
    """Write a lost manifest.json again from its copy, with a warning.

    Raises:
        DamagedError: a run that has begun has lost both.
    """
    restore_lost(rundir.manifest, rundir.manifest_lock)
    has_begun = rundir.config.exists() and (rundir.metrics.exists() or rundir.checkpoints.exists())
    if has_begun and not rundir.manifest.exists():
        raise DamagedError(Fault("", f"{rundir.manifest} is lost", WITHOUT_MANIFEST))


def discard(rundir: RunDir, folders: Iterable[Path] | None = None) -> None:
    """Remove the files of a run that was refused before it started, and the folders created for it.

    ``folders``: the created folders, innermost first; None: read them from the manifest.
    """
    if folders is None:
        folders = [Path(path) for path in rundir.read_manifest().get("made_folders", [])]
    copy_of(rundir.manifest).unlink(missing_ok=True)
    rundir.manifest.unlink(missing_ok=True)  # before the state: a manifest without a state would count as damaged
    for entry in list(rundir.path.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: contains another run
            folder.rmdir()
