"""The jobs of runs, by the recorded id and name."""

from __future__ import annotations

from pathlib import Path

import psutil
from conftest import TINY, prepared
from submitit.local.local import start_controller

from runner.cli import cancel
from runner.launch.slurm import submission
from runner.tracking import run_status
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import slurm_room


def test_a_process_of_the_same_number_is_not_ours(tmp_path: Path):
    rundir, other = (prepared(tmp_path / name, *TINY) for name in ("run", "other"))
    rooms = [slurm_room(each.path) for each in (rundir, other)]
    for room in rooms:
        room.mkdir()
    process = start_controller(rooms[1], "sleep 900")
    try:
        for each in (rundir, other):
            each.update_manifest(slurm={"job_id": str(process.pid), "name": "runner-x", "cluster": "local"})
        assert submission.is_queued([rundir, other]) == [False, True]
        assert run_status.of([rundir])[0].status == "pending"
        linked = tmp_path / "link"
        linked.symlink_to(other.path)
        assert submission.is_queued([RunDir(linked)]) == [True]
        assert cancel.main([str(rundir.path)]) == 0
        assert process.poll() is None
    finally:
        for each in [*psutil.Process(process.pid).children(), process]:
            each.kill()
        process.wait()
