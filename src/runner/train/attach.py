"""Follow the log of a run that another worker is training."""

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
    """Print the log of a run until the worker that holds its lock ends; Ctrl-C or SIGTERM stops only the printing.

    Returns:
        the exit code of the run; 130 (Ctrl-C) or 75 (SIGTERM) if the printing was stopped.
    """
    shown = rundir.log.stat().st_size if rundir.log.exists() else 0
    try:
        with Stop() as stop, stop.at_once():
            pid = rundir.read_state().pid
            print(f"{rundir.path} is being worked on (pid {pid}); following its log", file=sys.stderr)
            while rundir.is_alive():
                time.sleep(LOOK_S)
                shown = _show(rundir.log, shown)
            _show(rundir.log, shown)  # lines written after the last look
    except (Stopped, KeyboardInterrupt) as error:
        print("no longer following; the run goes on", file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else Interrupted.exit_code
    return outcome.exit_code(rundir.read_state())


def _show(log: Path, position: int) -> int:
    """Print the log from byte ``position`` on; return the new end of the log."""
    try:
        with log.open("rb") as handle:
            handle.seek(position)
            new = handle.read()
    except FileNotFoundError:  # no log yet, or the run was refused and its folder removed
        return position
    sys.stderr.write(new.decode(errors="replace"))
    return position + len(new)
