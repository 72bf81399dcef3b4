"""The main function of the upload process."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from runner.tracking.mirror import follow_sweep
from runner.tracking.mirror.follow import be_polite, follow
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


def main(argv: Sequence[str], publish: Publish) -> int:
    """``FOLDER [SINCE]``, ``--sweep SWEEP`` or ``--open SWEEP``; signals that are meant for workers are ignored.

    ``publish`` writes the results of a sweep onto its parent run. Returns the exit code.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # it ends by itself soon after its worker, once the end is uploaded
    how, folder = argv[0], Path(argv[-1] if argv[0].startswith("--") else argv[0])
    try:
        if how == "--open":
            return follow_sweep.open_only(SweepDir(folder))
        if how == "--sweep":
            return follow_sweep.follow_sweep(SweepDir(folder), publish)
        be_polite()
        return follow(RunDir(folder), float(argv[1]) if len(argv) > 1 else 0.0, publish)
    except FileNotFoundError:
        if folder.exists():
            raise
        return 0  # refused before it began, and tidied away
