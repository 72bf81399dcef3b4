"""One run in the queue of this machine."""

from __future__ import annotations

from pathlib import Path

from conftest import TINY, prepared

from runner.launch.local.queued_run import QueuedRun
from runner.tracking.state_file import DIED


def test_a_run_that_another_queue_stopped_is_continued(tmp_path: Path):
    """Unlike what was cancelled, has failed, or was killed by something else: it would only happen again."""
    rundir = prepared(tmp_path / "run", *TINY)
    job = QueuedRun(0, rundir)
    for attempt, (status, reason) in enumerate([("preempted", "stopped by SIGTERM"), ("killed", "interrupted")], 1):
        rundir.write_state(status=status, reason=reason, attempt=attempt)
        assert job.outcome() is None
    by_others = DIED, "cancelled by me", "killed by SIGKILL (out of memory)", "one of the 2 ranks died"
    for status, reason in [("failed", "no"), ("completed", ""), *(("killed", reason) for reason in by_others)]:
        rundir.write_state(status=status, reason=reason)
        assert job.outcome() == rundir.read_state(), reason
