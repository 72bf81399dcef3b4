"""Work on run folders in processes forked from a warm one, and kill them: used by test_resumed_runs.

python fork_server.py kill SEED FOLDER... -- OVERRIDE...   kill -9 each at a random moment, then continue it to its end

The first folder is left undisturbed. The last two go the way of the command line (hydra.run.dir=FOLDER OVERRIDE...),
the same command each time; the others that of a launcher, which starts a worker.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import accelerate  # noqa: F401 - loaded before the fork, so that every child starts warm
import peft  # noqa: F401
import transformers  # noqa: F401

from runner.cli import main as cli
from runner.tracking.rundir import RunDir
from runner.train import (
    worker,
)

Road = Callable[[], int]


def start(road: Road) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = road()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(rundir: RunDir, road: Road, chance: random.Random) -> str:
    """Kill -9 while the run is being built, or at some random step and a little after; says where it was."""
    target = chance.randrange(-3, 24)
    child = start(road)
    while rundir.read_state().step < target and not rundir.model.exists():
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.05 if target > 0 else 2.0))
    os.kill(child, signal.SIGKILL)
    code, state = finish(child), rundir.read_state()
    return f"exit code {code}, {state.status} at step {state.step}"


def main() -> None:
    at = sys.argv.index("--")
    chance, overrides = random.Random(int(sys.argv[2])), sys.argv[at + 1 :]
    reference, *rundirs = (RunDir(Path(folder)) for folder in sys.argv[3:at])
    assert finish(start(partial(worker.work, reference))) == 0
    for rundir in rundirs:
        road = partial(worker.work, rundir)
        if rundir in rundirs[-2:]:
            road = partial(cli.run, [f"hydra.run.dir={rundir.path}", *overrides])
        killed = kill_at_random(rundir, road, chance)
        print(f"{rundir.path}: {killed}; continued with exit code {finish(start(road))}", flush=True)


if __name__ == "__main__":
    main()
