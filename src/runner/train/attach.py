"""A second worker of a run: it follows the log of the first, and may leave."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from runner.errors import Interrupted, Stopped
from runner.signals import Stop
from runner.tracking.rundir import RunDir
from runner.train import outcome

LOOK_S = 0.5


def follow(rundir: RunDir) -> int:
    """Follow a run that another worker holds, until that worker lets go of it; Ctrl-C and SIGTERM end the following.

    Returns:
        the exit code of the run; 130 or 75 where the following was ended.
    """
    shown = rundir.log.stat().st_size if rundir.log.exists() else 0
    try:
        with Stop() as stop, stop.at_once():
            pid = rundir.read_state().pid
            print(f"{rundir.path} is being worked on (pid {pid}); following its log", file=sys.stderr)
            while rundir.is_alive():
                time.sleep(LOOK_S)
                shown = _show(rundir.log, shown)
            _show(rundir.log, shown)  # its last words may have come after the last look
    except (Stopped, KeyboardInterrupt) as error:
        print("no longer following; the run goes on", file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else Interrupted.exit_code
    return outcome.exit_code(rundir.read_state())


def _show(log: Path, position: int) -> int:
    """Copy to the terminal what came after ``position`` (bytes); returns where the log ends now."""
    try:
        with log.open("rb") as handle:
            handle.seek(position)
            new = handle.read()
    except FileNotFoundError:  # nothing is said yet, or the run was refused and is gone
        return position
    sys.stderr.write(new.decode(errors="replace"))
    return position + len(new)
