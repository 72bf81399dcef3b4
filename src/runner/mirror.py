"""``python -m runner.mirror``: the process that uploads run folders to MLflow.

``FOLDER [SINCE]`` follows one run, ``--sweep SWEEP`` all runs of a sweep; ``--open SWEEP`` creates the MLflow runs of a
sweep and leaves the rest to the processes of its jobs.
"""

from __future__ import annotations

import sys

from runner.report import publish
from runner.tracking.mirror import process

if __name__ == "__main__":
    sys.exit(process.main(sys.argv[1:], publish.send))
