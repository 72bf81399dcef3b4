"""status --watch on a terminal, with a real one."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from fixtures.run_folders import HOLD, _in_a_new_folder, holding, played, processes

from runner.cli import status_screen
from runner.cli.status_table import Group
from runner.tracking import metrics_log
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State

ON, OFF = b"\x1b[?1049h", b"\x1b[?1049l"


def run_of(folder: Path, label: str, status: str = "running", step: int = 4) -> RunStatus:
    rundir = RunDir(folder / label)
    rundir.path.mkdir()
    for each in range(step):
        record = {"train/loss": 4.0 - each, "memory/peak_rss_gib": 1.0 + each}
        metrics_log.append(rundir, {"step": each + 1, "time": 0.0, **record})
    state = State(status="running", step=step, total_steps=8, seconds=40.0, updated=2e9)
    return RunStatus(rundir, status, "", state, {"name": label})


def test_a_row_has_progress_loss_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_screen, "_draws_blocks", lambda: True)
    runs = [run_of(tmp_path, "ended", "completed"), run_of(tmp_path, "one")]
    groups = [Group(None, [run], False) for run in runs]
    title, _, head, first, second = status_screen.lines(groups, 120, 40)
    assert "1 completed, 1 running" in title
    assert head.split() == ["run", "status", "step", "loss", "left", "memory"]
    assert first.split() == ["one", "running", "█████░░░░░", "4/8", "█▆▃▁", "1.0000", "train", "40", "s", "4.0", "GiB"]
    assert second.startswith("ended"), "runs that proceed come first"


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_no_line_is_longer_than_the_terminal(tmp_path: Path, width: int) -> None:
    runs = [run_of(tmp_path, f"{'a-long-name-' * 6}{number}") for number in range(9)]
    screen = status_screen.lines([Group(None, [run], False) for run in runs], width, 8)
    assert max(map(len, screen)) <= width
    assert len(screen) == 8
    assert screen[-1].startswith("and 5 more"[:width])


@pytest.mark.parametrize(
    ("values", "blocks"),
    [([], ""), ([2.0], "▁"), ([1.0, float("nan"), 8.0], "▁█"), ([3.0, 2.0, 1.0], "█▅▁"), ([1.0, 1.0, 9.0, 9.0], "▁█")],
)
def test_the_curve_is_scaled_to_its_values(values: list[float], blocks: str) -> None:
    assert status_screen.curve(values, 2 if len(values) == 4 else 16) == blocks


@pytest.mark.parametrize(
    "way", ["q", *(pytest.param(way, marks=pytest.mark.slow) for way in ("ctrl-c", "sigterm", "end"))]
)
def test_the_terminal_and_the_runs_are_left_as_they_were(processes: list[subprocess.Popen[str]], way: str) -> None:
    worker = holding(played("a/1", "running"), processes)
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background
        os.execv(sys.executable, [sys.executable, "-m", "runner", "status", "--watch"])
    before = termios.tcgetattr(terminal)
    shown = read_until(terminal, b"running")
    assert ON in shown
    if way == "end":
        worker.kill()
    elif way == "sigterm":
        os.kill(pid, signal.SIGTERM)
    else:
        os.write(terminal, b"q" if way == "q" else b"\x03")
    shown = read_until(terminal, OFF, shown)
    if way != "sigterm":
        rest = shown.partition(OFF)[2]
        after = read_until(terminal, b"runs elsewhere" if way == "end" else b"stopped watching", rest)
        assert b"a/1" in after, "the table stays on the terminal"
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (128 + signal.SIGTERM if way == "sigterm" else 0)
    assert termios.tcgetattr(terminal) == before
    os.close(terminal)
    assert (worker.poll() is None) == (way != "end")


def read_until(terminal: int, words: bytes, shown: bytes = b"") -> bytes:
    while words not in shown:
        shown += os.read(terminal, 4096)
    return shown
