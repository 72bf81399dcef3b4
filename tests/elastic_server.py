"""Work on a run folder with several ranks, one of which may go wrong at a step: used by test_parallel.

python elastic_server.py FOLDER PROCESSES [raise|refuse|die|term|interrupt|drop STEP RANK]

``drop``: the launcher is told to stop, and the rank is killed before that can have reached it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from runner.errors import DataError, Fault
from runner.launch.local import accelerate
from runner.tracking.rundir import RunDir
from runner.train import loop
from runner.train.parts import Hooks, Parts

SIGNALS = {"die": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT, "drop": signal.SIGTERM}


def go_wrong(what: str, at: int, rank: int) -> None:
    """From now on, on this rank and before this step, the worst happens; "term" and "interrupt" reach the launcher."""
    step, launcher = loop.optimizer_step, os.getpid()

    def then(parts: Parts, progress: Any, hooks: Hooks) -> None:
        if progress.step == at and parts.ranks.rank == rank:
            if what == "raise":
                raise ZeroDivisionError("too deep a thought")
            if what == "refuse":
                raise DataError(Fault("data", "row 7 is gone"))
            if what == "drop":
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            os.kill(os.getpid() if what == "die" else launcher, SIGNALS[what])
            if what == "drop":
                os.kill(os.getpid(), signal.SIGKILL)
        step(parts, progress, hooks)

    loop.optimizer_step = then


if __name__ == "__main__":
    folder, processes, *wrong = sys.argv[1:]
    if wrong:
        go_wrong(wrong[0], int(wrong[1]), int(wrong[2]))
    sys.exit(accelerate.run(RunDir(Path(folder)), int(processes)))
