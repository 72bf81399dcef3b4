"""Check without importing MLflow whether a run is fully uploaded; upload it in a subprocess."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runner.errors import DamagedError
from runner.files import is_held
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import sweep_of

FOLDERS_AT_ONCE = 200
"""Folders per command line; far below the limit of any system."""


def is_wanted(rundir: RunDir) -> bool:
    """Whether the run is uploaded to MLflow automatically (not ``tracking=offline``)."""
    try:
        record = rundir.read_manifest()
    except DamagedError:  # status and sync report it
        return False
    if (record.get("mlflow") or {}).get("run_id"):
        return True
    if "tracking" in record:
        return bool(record["tracking"] == "mlflow")
    from runner.tracking.mirror import spawn  # imports omegaconf

    return spawn.is_mirrored(rundir)


def is_behind(rundir: RunDir) -> bool:
    """Whether an ended run is not fully uploaded, and no process is uploading it."""
    return not is_complete(rundir) and not _is_uploading(rundir) and is_wanted(rundir)


def is_complete(rundir: RunDir) -> bool:
    """Whether MLflow and the other trackers have everything of an ended run."""
    try:
        report = json.loads(rundir.mirror_report.read_text())
        problems = [report.get("problem"), *report.get("also", {}).values()]
        return not any(problems) and bool(report["uploaded"] == rundir.read_state().updated)
    except (OSError, ValueError, AttributeError, KeyError, DamagedError):
        return False


def upload_ended(ended: Sequence[RunDir]) -> int:
    """Upload those of the ended runs that are not fully uploaded, and report it; returns their number."""
    behind = [rundir for rundir in ended if is_behind(rundir)]
    if not behind:
        return 0
    runs = f"{len(behind)} runs" if len(behind) > 1 else behind[0].path.name
    print(f"not fully uploaded: {runs}; uploading now …", file=sys.stderr, flush=True)
    problems = upload([rundir.path for rundir in behind])
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    if problems:
        print("  retry later: python -m runner sync", file=sys.stderr)
    else:
        for status, count in sorted(Counter(rundir.read_state().status for rundir in behind).items()):
            print(f"  uploaded: {count} {status}", file=sys.stderr)
    return len(behind)


def upload(folders: Sequence[Path]) -> list[str]:
    """Upload runs and sweeps with ``runner sync`` (some seconds, mostly importing MLflow); returns error messages."""
    problems: list[str] = []
    for first in range(0, len(folders), FOLDERS_AT_ONCE):
        batch = map(str, folders[first : first + FOLDERS_AT_ONCE])
        command = [sys.executable, "-P", "-m", "runner", "sync", *batch]
        result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if result.returncode:
            problems += result.stderr.strip().splitlines()
    return problems


def _is_uploading(rundir: RunDir) -> bool:
    """Whether an upload process of the run or of its sweep is running."""
    sweep = sweep_of(rundir)
    return any(is_held(lock) for lock in (rundir.mirror_lock, *([sweep.mirror_lock] if sweep else [])))
