"""Following submitted runs to their ends: the queue says whether a job has ended, the folder how."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from runner.errors import LaunchError
from runner.launch import submission
from runner.rundir import RunDir

CODES = {"completed": 0, "failed": 1, "killed": 130, "preempted": 75}
FIRST_LOOK_S, LAST_LOOK_S = 1.0, 15.0
"""Seconds between two questions to the scheduler, at the beginning and in the long run: it serves many."""
SETTLING_S = 2.0
"""How much later than its job's end a run's last words may reach us over a shared file system."""


def follow(rundirs: Sequence[RunDir]) -> list[int]:
    """Wait until every run's job has left the queue; Ctrl-C ends the waiting alone.

    Returns:
        the exit code of each run; 0 for those that still go on after Ctrl-C.
    """
    codes: dict[RunDir, int] = {}
    pause = FIRST_LOOK_S
    try:
        while len(codes) < len(rundirs):
            time.sleep(pause)
            for rundir in _ended([rundir for rundir in rundirs if rundir not in codes]):
                codes[rundir] = _code(rundir)
                print(f"[{len(codes)}/{len(rundirs)}] {_line(rundir)}", file=sys.stderr)
                pause = FIRST_LOOK_S
            pause = min(LAST_LOOK_S, pause * 1.3)
    except KeyboardInterrupt:
        left = len(rundirs) - len(codes)
        print(f"\nno longer following; {left} of {len(rundirs)} runs go on", file=sys.stderr)
        print("    python -m runner status, logs and cancel take their folders", file=sys.stderr)
    return [codes.get(rundir, 0) for rundir in rundirs]


def _ended(rundirs: list[RunDir]) -> list[RunDir]:
    try:
        queued = submission.is_queued(rundirs)
    except LaunchError as error:  # the jobs do not need the controller, and it comes back
        print(f"{error.faults[0].problem}; asking again", file=sys.stderr)
        return []
    return [rundir for rundir, is_queued in zip(rundirs, queued, strict=True) if not is_queued]


def _code(rundir: RunDir) -> int:
    if rundir.read_state().status not in CODES:
        time.sleep(SETTLING_S)
    return CODES.get(rundir.read_state().status, 1)


def _line(rundir: RunDir) -> str:
    state, manifest = rundir.read_state(), rundir.read_manifest()
    if state.status in CODES:
        how = f"{state.status}{f': {state.reason}' if state.reason else ''}"
    else:
        how = f"its job {manifest['slurm']['job_id']} ended without a word; python -m runner logs {rundir.path}"
    return f"{manifest.get('name')}: {how}"
