"""Signals stop a run at a safe point."""

from __future__ import annotations

import os
import signal
import time

import pytest

from runner.errors import Preempted
from runner.signals import ONE_GESTURE_S, Stop


def test_a_second_interrupt_waits_for_nothing():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, from the terminal and from a launcher
        time.sleep(1.2 * ONE_GESTURE_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may send several: the last word counts
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            stop.check()
        os.kill(os.getpid(), signal.SIGUSR2)  # Slurm's warning
        with pytest.raises(Preempted, match="SIGUSR2"):
            stop.check()
        with pytest.raises(Preempted), stop.at_once():
            raise AssertionError("asked to stop before the block")
