"""Train a run folder in a process that kills itself (SIGKILL) at a record; used by fixtures/killed_runs.

python kill_server.py FOLDER [METRIC STEP]    it dies as soon as it has recorded METRIC of STEP
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import worker


def die_after(metric: str, step: int) -> None:
    append = metrics_log.append

    def appending(rundir: RunDir, record: Mapping[str, Any]) -> None:
        append(rundir, record)
        if record["step"] == step and metric in record:
            os.kill(os.getpid(), signal.SIGKILL)

    metrics_log.append = appending


if __name__ == "__main__":
    folder, *death = sys.argv[1:]
    if death:
        die_after(death[0], int(death[1]))
    sys.exit(worker.work(RunDir(Path(folder))))
