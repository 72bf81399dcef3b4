"""Work through the runs of a sweep in a queue; used by test_local, which stops and kills it.

python queue_server.py PARALLEL SWEEP [imitate|ranks] [held]   prints the exit codes

``imitate``: the runs do what their names say; ``ranks``: each run has two processes; ``held``: real runs wait before
their third step, see gate.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gate

from runner.launch.local import accelerate, launcher, queue
from runner.launch.local.slots import Slot
from runner.signals import Stop
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


def imitate(rundir: RunDir) -> int:
    """Take the state through its course as a worker does, and end as the run's name says."""
    with rundir.held() as mine, Stop() as stop:
        assert mine
        state = rundir.read_state()
        rundir.write_state(status="running", attempt=state.attempt + 1, pid=os.getpid(), step=1, total_steps=2)
        print("a line for the terminal")
        match rundir.read_manifest()["name"].split():
            case ["crash"]:
                ctypes.string_at(0)
            case ["exit", code]:
                os._exit(int(code))
            case ["leave"]:
                left = subprocess.Popen(["sleep", "60"])
                rundir.write_state(step=left.pid)
                os.kill(os.getpid(), signal.SIGKILL)
            case ["fail"]:
                rundir.write_state(status="failed", reason="as asked")
                return 1
            case ["sleep", seconds]:
                until = time.monotonic() + float(seconds)
                while time.monotonic() < until:
                    time.sleep(0.01)
                    if stop.requested:
                        rundir.write_state(status=stop.requested.status, reason=str(stop.requested))
                        return stop.requested.exit_code
        rundir.write_state(status="completed", step=2, summary={"eval/loss": 1.25})
        return 0


if __name__ == "__main__":
    parallel, sweep, how = int(sys.argv[1]), SweepDir(Path(sys.argv[2])), sys.argv[3:]
    if "held" in how:
        gate.hold(2)
    if "imitate" in how:
        codes = queue.work_through(sweep.rundirs(), [Slot(1)] * parallel, imitate, sweep)
    elif "ranks" in how:
        codes = accelerate.Elastic(2).launch(sweep.rundirs(), sweep)
    else:
        codes = launcher.Local(parallel, 1).launch(sweep.rundirs(), sweep)
    print(*codes)
