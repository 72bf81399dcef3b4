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
import yaml

from runner.config.bind import bind, config_dir, find_faults
from runner.tracking import metrics_log, trackers
from runner.tracking.mirror import spawn
from runner.tracking.rundir import RunDir

OPTION: dict[str, Any] = {
    "_target_": "runner.tracking.trackers.mlflow",
    "uri": None,
    "experiment": "runner",
    "run_name": None,
    "log_model": "adapter",
    "system_metrics": True,
    "system_interval_s": 10.0,
}


def record(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "time": 1.5 + step, **metrics}


def steps(rundir: RunDir) -> list[int]:
    return [line["step"] for line in metrics_log.read(rundir)]


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


def test_a_half_written_line_is_left_out_and_a_broken_one_is_said(
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


@pytest.mark.parametrize("name", ["mlflow", "server", "offline"])
def test_yaml_binds(name: str) -> None:
    node = yaml.safe_load((config_dir() / "tracking" / f"{name}.yaml").read_text())
    assert node.pop("uri", None) in (None, "???")
    made = bind(
        node | ({"uri": "http://127.0.0.1:5000"} if name == "server" else {} if name == "offline" else {"uri": None})
    )()
    assert made.kind == ("offline" if name == "offline" else "mlflow")
    assert made.experiment == "runner"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "sqlite under outputs_dir"),
        ("mlruns", "sqlite under outputs_dir"),
        ("file:///tmp/mlruns", "no longer supports"),
        ("localhost:5000", "http://localhost:5000"),
        ("htp://host", "did you mean 'http'?"),
        ("http:///path", "has no host"),
        ("http://host:port", "an invalid port"),
        ("http://ho st", "has no host"),
        ("sqlite:///mlflow.db", "absolute path"),
        ("sqlite://", "absolute path"),
        ("postgresql+nodriver://host/db", "needs the package nodriver"),
        ("", "sqlite under outputs_dir"),
    ],
)
def test_a_wrong_uri_is_a_fault_without_importing_mlflow(uri: str, said: str) -> None:
    faults = list(find_faults({**OPTION, "uri": uri}, "tracking"))
    assert [fault.key for fault in faults] == ["tracking.uri"]
    assert said in str(faults[0])


def test_faults_of_names_and_numbers() -> None:
    node = {**OPTION, "experiment": " ", "run_name": "x" * 300, "uri": "mlruns"}
    assert [fault.key for fault in find_faults(node)] == ["experiment", "run_name", "uri"]
    wrong = {**OPTION, "system_interval_s": 0, "log_model": "all", "experimant": "x"}
    assert {fault.key for fault in find_faults(wrong)} == {"system_interval_s", "log_model", "experimant"}


def test_right_uris_pass_and_passwords_are_not_shown() -> None:
    for uri in ("http://127.0.0.1:5000", "https://me:secret@host/path", "sqlite:////tmp/mlflow.db", None):
        assert list(find_faults({**OPTION, "uri": uri})) == []
    assert "hunter2" not in str(next(find_faults({**OPTION, "uri": "htp://me:hunter2@host"})))


def test_the_store_is_embedded_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.store_uri(bind(OPTION)(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert trackers.store_uri(bind(OPTION)(), "outputs") == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert trackers.store_uri(bind({**OPTION, "uri": "http://host"})(), tmp_path) == "http://host"


def test_offline_starts_nothing(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    metrics_log.append(rundir, record(1))
    node = {"_target_": "runner.tracking.trackers.offline", "experiment": "x", "run_name": None, "log_model": False}
    assert spawn.start_mirror(rundir, {"tracking": node}) is None
    result = spawn.wait_mirror(None, rundir)
    assert (result.url, result.unsent) == (None, 1)
    assert result.message == "tracking=offline"


def test_importing_is_light() -> None:
    heavy = (
        "import sys, runner.tracking, runner.secrets; print({'mlflow', 'torch', 'pandas', 'psutil'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("dropped", "step", "evaluated", "words"),
    [
        ((), 6, True, ""), ((), 10, True, ""), ((), 4, False, ""),
        ((("eval", 0),), 6, True, "1 of 5 records up to step 6 are missing (of step 0)"),
        ((("train", 4), ("eval", 5)), 6, True, "2 of 5 records up to step 6 are missing (of step 4, 5)"),
        ((("train", 8), ("eval", 10)), 6, True, ""),
        ((("eval", 10),), 10, True, "1 of 8 records up to step 10 are missing (of step 10)"),
        ((("eval", 5),), 5, False, ""),
        ((("eval", 5),), 5, True, "1 of 4 records up to step 5 are missing (of step 5)"),
    ],
)  # fmt: skip
def test_lost_records_are_those_that_the_configuration_asks_for(
    dropped: tuple[tuple[str, int], ...], step: int, evaluated: bool, words: str
) -> None:
    records = [
        {"step": each, "train/learning_rate": 0.1} for each in (2, 4, 6, 8, 10) if ("train", each) not in dropped
    ]
    records += [{"step": each, "eval/loss": 1.0} for each in (0, 5, 10) if ("eval", each) not in dropped]
    train = {"logging_steps": 2, "eval_steps": 5}
    assert words in metrics_log.lost(records, train, step, 10, evaluated=evaluated)
    assert bool(words) == bool(metrics_log.lost(records, train, step, 10, evaluated=evaluated))
