"""Runs that wait before a step until they are let go or told to stop, so that a test can disturb them there.

``hold(step)`` in the process that works on the runs, or forks those that do; the rest in the test.

python gate.py STEP FOLDER    trains the run in a process of its own, held before this step
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from runner.errors import Stopped
from runner.tracking.rundir import RunDir

HELD, OPEN = ".held", ".open"
"""Files in the run folder: that the run has come to the gate, and that it may pass."""


def hold(step: int) -> None:
    """From now on every run of this process waits before its optimizer step number ``step`` (the first is 0)."""
    from runner.train import loop
    from runner.train.parts import Hooks, Parts

    optimizer_step = loop.optimizer_step

    def waiting(parts: Parts, progress: Any, hooks: Hooks) -> None:
        folder = parts.checkpoints.folder.parent
        if progress.step == step:
            (folder / HELD).touch()
        while progress.step == step and not (folder / OPEN).exists() and not _is_told_to_stop(hooks):
            time.sleep(0.01)
        optimizer_step(parts, progress, hooks)  # which stops on all ranks alike

    loop.optimizer_step = waiting


def has_come(rundir: RunDir) -> bool:
    """Whether the run waits at the gate, or has passed it."""
    return (rundir.path / HELD).exists()


def let_go(rundir: RunDir) -> None:
    Path(rundir.path / OPEN).touch()


def _is_told_to_stop(hooks: Any) -> bool:
    try:
        hooks.check_stop()
    except Stopped:
        return True
    return False


if __name__ == "__main__":
    from runner.train import worker

    hold(int(sys.argv[1]))
    sys.exit(worker.work(RunDir(Path(sys.argv[2]))))
