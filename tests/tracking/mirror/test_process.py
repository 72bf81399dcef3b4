"""The main function of the upload process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from runner.signals import SIGNALS
from runner.tracking.mirror import process


@pytest.mark.parametrize("mode", [[], ["--open"], ["--sweep"]])
def test_it_ends_when_its_folder_was_removed_and_not_by_the_signals_that_stop_workers(
    mode: list[str], tmp_path: Path
) -> None:
    """In a process of its own, as it lowers its priority for good."""
    if not (pid := os.fork()):
        code = 9
        try:
            code = process.main([*mode, str(tmp_path / "refused")], lambda *_: None)
            assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
        except BaseException:
            code = 9
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not (tmp_path / "refused").exists()
