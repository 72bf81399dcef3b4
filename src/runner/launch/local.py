"""Run here and now: a prepared folder is handed to a worker in this process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

from runner import console
from runner.rundir import RunDir
from runner.stop import signals_to


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
    console.quiet_libraries()
    import accelerate
    import peft
    import transformers

    assert accelerate
    assert peft
    assert transformers
    codes: list[int] = []
    forwarding = _Forwarding()
    with signals_to(forwarding.on_signal):
        for number, rundir in enumerate(rundirs, 1):
            print(f"[{number}/{len(rundirs)}] {rundir.read_manifest().get('name')}", file=sys.stderr)
            codes.append(forwarding.wait(_fork(rundir)))
            if forwarding.signalled or codes[-1] in (75, 130):
                break
    return codes


def _fork(rundir: RunDir) -> int:
    """Work on the folder in a process forked from this one; returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = launch(rundir)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Forwarding:
    """While children work, what would end this process is theirs to honour: they save, and end in their own way."""

    def __init__(self) -> None:
        self.signalled = False
        self._child = 0

    def wait(self, child: int) -> int:
        """The exit code of the child; 1 where a signal ended it."""
        self._child = child
        _, status = os.waitpid(child, 0)
        self._child = 0
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1

    def on_signal(self, number: int, _: FrameType | None) -> None:
        self.signalled = True
        if self._child and number == signal.SIGTERM:  # Ctrl-C reaches the child from the terminal
            os.kill(self._child, number)
