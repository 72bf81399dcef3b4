"""Train a run folder and send this process a signal at a certain moment; used by test_signals.

python stop_server.py SIGNAL MOMENT FOLDER [ignored]    ignored: the process ignores the signal from its start
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.models import pretrained
from runner.tracking.rundir import RunDir
from runner.train import build, evaluation, inputs, loop, run_summary, worker
from runner.train.checkpoint import Checkpoints

MOMENTS: dict[str, tuple[Any, str, int]] = {
    "tokenizing": (inputs, "inputs", 1),
    "loading": (build, "parts", 1),
    "first step": (loop, "accumulate_gradients", 1),
    "later step": (loop, "accumulate_gradients", 4),
    "first evaluation": (evaluation, "sums_of", 1),
    "later evaluation": (evaluation, "sums_of", 2),
    "saving": (Checkpoints, "save", 1),
    "the end": (pretrained, "save", 1),
    "printing the result": (run_summary, "ending", 1),
}
"""Moment → (module or class, function, at which call of the function the signal comes)."""


def interrupt(where: Any, name: str, call: int, number: int) -> None:
    """Send this process the signal at the beginning of that call of the function."""
    function: Callable[..., Any] = getattr(where, name)
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    setattr(where, name, interrupted)


if __name__ == "__main__":
    number = int(sys.argv[1])
    if "ignored" in sys.argv[4:]:
        signal.signal(number, signal.SIG_IGN)
    interrupt(*MOMENTS[sys.argv[2]], number)
    sys.exit(worker.work(RunDir(Path(sys.argv[3]))))
