"""The mirror of a run is started and waited for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from fixtures.mirrored_runs import make_run

from runner.tracking.mirror import spawn


def test_a_run_that_was_refused_leaves_nothing(tmp_path: Path) -> None:
    gone, idle = make_run(tmp_path, "gone"), make_run(tmp_path, "idle")
    with gone.held() as mine:
        assert mine
        processes = [spawn.start_mirror(rundir) for rundir in (gone, idle)]
        time.sleep(0.3)
        shutil.rmtree(gone.path)
        assert [process.wait() for process in processes if process] == [0, 0]
    assert not gone.path.exists()
    assert not (tmp_path / "mlflow.db").exists()
    assert idle.mirror_log.read_text() == ""
    assert spawn.wait_mirror(processes[1], idle).message == ""
