"""The records of a run in its folder, and the options that say where else they are shown."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir


def record(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "time": 1.5 + step, **metrics}


def steps(rundir: RunDir) -> list[int]:
    return [line["step"] for line in metrics_log.read(rundir)]


def test_the_last_value_is_read_from_the_end(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    assert metrics_log.last_of(rundir, "eval/loss") is None
    for number in range(3000):
        metrics_log.append(rundir, record(number, **{"train/loss": 1.0 * number, "memory/peak_rss_gib": 1.0}))
    metrics_log.append(rundir, record(3000, **{"eval/loss": math.nan, "train/loss": 0.0}))
    assert metrics_log.last_of(rundir, "train/loss") == ("train/loss", 0.0)
    name, value = metrics_log.last_of(rundir, "eval/loss", "train/loss") or ("", 0.0)
    assert (name, math.isnan(value)) == ("eval/loss", True)
    with rundir.metrics.open("a") as handle:
        handle.write('17\n{"step": 3001, "train/lo')
    assert metrics_log.last_of(rundir, "train/loss") == ("train/loss", 0.0), "without the lines that are cut off"
    assert metrics_log.last_of(rundir, "train/mfu") is None


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    assert metrics_log.read(rundir) == []
    written = [record(1, a=0.1), record(2, a=math.inf, b=-math.inf), record(3, a=1e-300)]
    for line in written:
        metrics_log.append(rundir, line)
    metrics_log.append(rundir, record(4, a=math.nan))
    metrics_log.sync_to_disk(rundir)
    back = metrics_log.read(rundir)
    assert back[:3] == written
    assert math.isnan(back[3]["a"])
    for text in rundir.metrics.read_text().splitlines():
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_half_written_line_is_left_out_and_a_broken_one_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rundir = RunDir(tmp_path)
    metrics_log.append(rundir, record(1, a=1.0))
    with rundir.metrics.open("ab") as handle:
        handle.write(b'{"step": 2, "ti')
    assert steps(rundir) == [1]
    assert not caplog.records
    with rundir.metrics.open("ab") as handle:
        handle.write(b'\n\x00\x00\n[3]\n{"a": 1}\n')
    metrics_log.append(rundir, record(3, a=1.0))
    assert steps(rundir) == [1, 3]
    assert len(caplog.records) == 4


def test_tail_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    metrics_log.append(rundir, record(1))
    first, offset = metrics_log.tail(rundir.metrics, 0)
    assert [line["step"] for line in first] == [1]
    with rundir.metrics.open("ab") as handle:
        handle.write(b'{"step": 2,')
    assert metrics_log.tail(rundir.metrics, offset) == ([], offset)
    with rundir.metrics.open("ab") as handle:
        handle.write(b' "time": 1}\n')
    assert [line["step"] for line in metrics_log.tail(rundir.metrics, offset)[0]] == [2]


def test_rewind_cuts_back_to_a_checkpoint(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    assert metrics_log.rewind(rundir, 3) == 0
    for line in (record(0, **{"eval/loss": 2.0}), record(1, x=1.0), record(2, x=1.0), record(2, **{"eval/loss": 1.0})):
        metrics_log.append(rundir, line)
    metrics_log.append(rundir, record(3, x=math.nan))
    whole = rundir.metrics.read_bytes()
    inode = rundir.metrics.stat().st_ino
    assert metrics_log.rewind(rundir, 3) == 0
    assert rundir.metrics.stat().st_ino == inode, "an untouched file stays the same file"
    with rundir.metrics.open("ab") as handle:
        handle.write(b'{"half')
    assert metrics_log.rewind(rundir, 3) == 0
    assert rundir.metrics.read_bytes() == whole, "what a crash left at the end is cut off"
    assert metrics_log.rewind(rundir, 2) == 1
    assert steps(rundir) == [0, 1, 2, 2]
    assert metrics_log.rewind(rundir, 2, evaluated=False) == 1
    assert steps(rundir) == [0, 1, 2], "an evaluation that will be made again is cut, the training record is kept"
    assert metrics_log.rewind(rundir, 0, evaluated=False) == 3
    assert rundir.metrics.read_bytes() == b""


def test_a_full_disk_takes_no_part_of_a_record(tmp_path: Path) -> None:
    """A limit on the file's size makes the kernel write a part, as a full disk does."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from runner.tracking import metrics_log\nfrom runner.tracking.rundir import RunDir\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))\n"
        "rundir = RunDir(Path(sys.argv[1]))\n"
        "for step in range(9): metrics_log.append(rundir, {'step': step, 'time': 1.0, 'train/loss': 1.0})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 28]" in done.stderr
    content = RunDir(tmp_path).metrics.read_bytes()
    assert content.endswith(b"}\n")
    assert steps(RunDir(tmp_path)) == list(range(len(content) // len(content.splitlines()[0] + b"\n")))


def test_records_survive_kill_9(tmp_path: Path) -> None:
    script = (
        "import itertools, sys\nfrom pathlib import Path\n"
        "from runner.tracking import metrics_log\nfrom runner.tracking.rundir import RunDir\n"
        "for step in itertools.count():\n"
        "    metrics_log.append(RunDir(Path(sys.argv[1])), {'step': step, 'time': 1.0, 'a': 0.5})\n"
        "    print(step, flush=True)\n"
    )
    proc = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert proc.stdout
    for _ in range(200):
        proc.stdout.readline()
    os.kill(proc.pid, signal.SIGKILL)
    last = int((proc.stdout.read().split() or ["199"])[-1])
    proc.wait()
    assert steps(RunDir(tmp_path))[: last + 1] == list(range(last + 1))
