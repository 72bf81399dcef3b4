"""Work on run folders in processes forked from a warm one, and kill them: used by test_resume.

python fork_server.py run FOLDER            work to the end; prints the exit code
python fork_server.py kill SEED FOLDER...   kill -9 each at a random moment, then continue it to its end
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 - loaded before the fork, so that every child starts warm
import peft  # noqa: F401
import transformers  # noqa: F401

from runner import build, train, worker  # noqa: F401
from runner.rundir import RunDir


def start(folder: str) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = worker.work(RunDir(Path(folder)))
        finally:
            os._exit(code)
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(folder: str, chance: random.Random) -> str:
    """Kill -9 while the run is being built, or at some random step and a little after; says where it was."""
    rundir, target = RunDir(Path(folder)), chance.randrange(-3, 24)
    child = start(folder)
    while rundir.read_state().step < target and not rundir.model.exists():
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.05 if target > 0 else 2.0))
    os.kill(child, signal.SIGKILL)
    code, state = finish(child), rundir.read_state()
    return f"exit code {code}, {state.status} at step {state.step}"


def main() -> None:
    if sys.argv[1] == "run":
        print(finish(start(sys.argv[2])))
        return
    chance = random.Random(int(sys.argv[2]))
    reference, *folders = sys.argv[3:]
    assert finish(start(reference)) == 0
    for folder in folders:
        killed = kill_at_random(folder, chance)
        print(f"{folder}: {killed}; continued with exit code {finish(start(folder))}", flush=True)


if __name__ == "__main__":
    main()
