"""Whether MLflow knows what a run folder says, seen without MLflow; and telling it, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runner.files import is_held
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import sweep_of

FOLDERS_AT_ONCE = 200
"""In one command line; far below what any system takes."""


def is_wanted(rundir: RunDir) -> bool:
    """Whether the run is one that MLflow hears of without being asked (not ``tracking=offline``)."""
    manifest = rundir.read_manifest()
    if (manifest.get("mlflow") or {}).get("run_id"):
        return True
    if "tracking" in manifest:
        return bool(manifest["tracking"] == "mlflow")
    try:  # a run of version 0.1.0; read as text, since parsing the YAML of a thousand folders takes its time
        return "_target_: runner.tracking.mlflow\n" in rundir.config.read_text()
    except (OSError, ValueError):
        return False


def is_behind(rundir: RunDir) -> bool:
    """Whether a run that has ended was not told to the end, and no process is about to do so."""
    said = rundir.mirror_report
    try:
        is_later = said.stat().st_mtime >= rundir.state.stat().st_mtime
        told = is_later and not json.loads(said.read_text()).get("problem")
    except (OSError, ValueError, AttributeError):
        told = False
    return not told and not _is_being_told(rundir) and is_wanted(rundir)


def tell_of(ended: Sequence[RunDir]) -> int:
    """Tell MLflow of those of these runs whose end it has not heard of, and say so; returns how many there were."""
    behind = [rundir for rundir in ended if is_behind(rundir)]
    if not behind:
        return 0
    runs = f"{len(behind)} runs" if len(behind) > 1 else behind[0].path.name
    print(f"MLflow has not heard of the end of {runs}; it is told now …", file=sys.stderr, flush=True)
    problems = tell([rundir.path for rundir in behind])
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    if problems:
        print("  again later: python -m runner sync", file=sys.stderr)
    else:
        for status, count in sorted(Counter(rundir.read_state().status for rundir in behind).items()):
            print(f"  told: {count} {status}", file=sys.stderr)
    return len(behind)


def tell(folders: Sequence[Path]) -> list[str]:
    """Bring runs and sweeps into MLflow, in seconds, most of them its import; returns what could not be brought."""
    problems: list[str] = []
    for first in range(0, len(folders), FOLDERS_AT_ONCE):
        some = map(str, folders[first : first + FOLDERS_AT_ONCE])
        command = [sys.executable, "-P", "-m", "runner", "sync", *some]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            problems += done.stderr.strip().splitlines()
    return problems


def _is_being_told(rundir: RunDir) -> bool:
    """Whether a process that mirrors the run, or its sweep, is at work."""
    sweep = sweep_of(rundir)
    return any(is_held(lock) for lock in (rundir.mirror_lock, *([sweep.mirror_lock] if sweep else [])))
