"""Run here and now: a prepared folder is handed to a worker in this process."""

from __future__ import annotations

import os
import sys

from runner.rundir import RunDir


def local() -> str:
    """Train in this process, on this machine."""
    return "local"


def launch(rundir: RunDir) -> int:
    """Work on the folder to its end; returns the exit code (0, 1, 2, 75 or 130)."""
    from runner import worker

    return worker.work(rundir)


def launch_each(rundirs: list[RunDir]) -> list[int]:
    """Work on one folder after another, each in a process of its own; returns the exit codes.

    The processes are forked from this one after the libraries are imported, so that each further job starts warm.
    Nothing may touch CUDA or start threads of computation before that. After Ctrl-C or SIGTERM no further job starts.
    """
    import accelerate
    import peft
    import transformers

    assert accelerate
    assert peft
    assert transformers
    codes: list[int] = []
    for number, rundir in enumerate(rundirs, 1):
        print(f"[{number}/{len(rundirs)}] {rundir.read_manifest().get('name')}", file=sys.stderr)
        codes.append(_in_child(rundir))
        if codes[-1] in (75, 130):
            break
    return codes


def _in_child(rundir: RunDir) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = launch(rundir)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return _wait(child)


def _wait(child: int) -> int:
    """Wait for the child; the signals that end us reach it too, and it decides how to end."""
    import signal

    def forward(number: int, _: object) -> None:
        os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM,)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
