"""The main function of the upload process."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from runner.signals import SIGNALS
from runner.tracking.mirror import follow_sweep
from runner.tracking.mirror.follow import follow, lower_priority
from runner.tracking.mlflow.parent_run import Publish
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


def main(argv: Sequence[str], publish: Publish) -> int:
    """Run the upload process; returns the exit code. Ignores the signals that stop workers.

    Args:
        argv: ``FOLDER [SINCE]``, ``--sweep SWEEP`` or ``--open SWEEP``.
        publish: writes the results of a sweep to its parent run.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # ends by itself once the end of the run is uploaded
    mode, folder = argv[0], Path(argv[-1] if argv[0].startswith("--") else argv[0])
    if not folder.is_dir():
        return 0  # removed before this process began; a lock would create the folder again
    try:
        if mode == "--open":
            return follow_sweep.open_only(SweepDir(folder))
        if mode == "--sweep":
            return follow_sweep.follow_sweep(SweepDir(folder), publish)
        lower_priority()
        return follow(RunDir(folder), float(argv[1]) if len(argv) > 1 else 0.0, publish)
    except FileNotFoundError:
        if folder.exists():
            raise
        return 0  # the run was refused before it started, and its folder removed
