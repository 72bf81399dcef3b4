"""Check without importing MLflow whether a run is fully uploaded; upload it in a subprocess."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from runner.errors import DamagedError
from runner.files import is_held
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import sweep_of

UPLOADING = "uploading runs to MLflow:"
"""Beginning of the lines in which ``sync`` shows its progress."""
LONGEST_COMMAND = 200_000
"""Characters of a command line with folders: some thousand of them; far below the limit of any system (1 MiB)."""


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
    """Upload runs and sweeps with ``runner sync`` (some seconds, mostly importing MLflow); returns error messages.

    Its progress is shown on stderr.
    """
    problems: list[str] = []
    for batch in commands(folders):
        command = [sys.executable, "-P", "-m", "runner", "sync", *batch]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            lines = [line for line in map(str.strip, process.stderr) if line and not _show(line)]
        if process.returncode:
            problems += lines
    return problems


def commands(folders: Iterable[Path]) -> Iterator[list[str]]:
    """The folders in as few command lines as possible: each imports MLflow."""
    batch: list[str] = []
    length = 0
    for folder in map(str, folders):
        length += len(folder) + 1
        if batch and length > LONGEST_COMMAND:
            yield batch
            batch, length = [], len(folder) + 1
        batch.append(folder)
    if batch:
        yield batch


def _show(line: str) -> bool:
    """Show a line about the progress; False if it is another line."""
    is_progress = line.startswith(UPLOADING)
    if is_progress:
        print(f"  {line}", file=sys.stderr, flush=True)
    return is_progress


def _is_uploading(rundir: RunDir) -> bool:
    """Whether an upload process of the run or of its sweep is running."""
    sweep = sweep_of(rundir)
    return any(is_held(lock) for lock in (rundir.mirror_lock, *([sweep.mirror_lock] if sweep else [])))
