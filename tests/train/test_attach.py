"""A second worker of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from conftest import TINY, prepared
from test_resumed_runs import wait_for_step, worker_process


def test_a_second_worker_follows_the_first(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=40")
    first = worker_process(rundir)
    wait_for_step(rundir, 1, first)
    first.send_signal(signal.SIGSTOP)  # it must not end before the second has come
    second = worker_process(rundir)
    assert second.stderr is not None
    heard = second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    second.communicate()
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert f"is being worked on (pid {first.pid})" in heard
    assert rundir.read_state().attempt == 1
    assert os.path.exists(rundir.model)
