"""``python -m runner.worker FOLDER``: one rank of one run; all that a launcher has to start."""

from __future__ import annotations

import sys
from pathlib import Path

from runner.tracking.rundir import RunDir
from runner.train import worker

if __name__ == "__main__":
    sys.exit(worker.work(RunDir(Path(sys.argv[1]).resolve())))
