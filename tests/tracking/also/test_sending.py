"""Records go to each tracker once, and one that fails stops nothing else."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from conftest import composed
from fixtures.event_files import expected, points
from fixtures.mirrored_runs import assert_mirrored, finish, make_run, outputs

from runner.config.bind import bind
from runner.errors import ConfigError
from runner.tracking import manifest, metrics_log
from runner.tracking.also.sending import Sending
from runner.tracking.mirror import backlog, follow, spawn, sync
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.rundir import RunDir

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
ALSO = ["tensorboard"]


def test_a_process_that_follows_sees_the_file_cut_back(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=ALSO), range(1, 6), "running")
    run = MlflowRun.of(rundir)
    sending = Sending(rundir, run.tracking, run.config, run.also)
    assert sending.send(rundir.read_state()) == []
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    metrics_log.rewind(rundir, 3)
    finish(rundir, range(4, 5))
    assert sending.send(rundir.read_state()) == []
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    before = list(rundir.tensorboard.iterdir())
    assert sending.send(rundir.read_state()) == []
    assert list(rundir.tensorboard.iterdir()) == before, "an end is written once"


def test_a_tracker_that_fails_stops_nothing_and_sync_sends_it_later(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=ALSO))
    rundir.tensorboard.write_text("in the way")
    assert follow.follow(rundir) == 0
    assert_mirrored(rundir, "FINISHED")
    problem = spawn.read_report(rundir)["also"]["tensorboard"]
    assert "Error" in problem
    assert backlog.is_behind(rundir)
    (failed,) = sync.sync([rundir.path])
    assert failed.problem == f"tensorboard: {problem}"
    rundir.tensorboard.unlink()
    (synced,) = sync.sync([rundir.path])
    assert (synced.problem, backlog.is_behind(rundir)) == ("", False)
    assert points(rundir, "train/loss") == expected(rundir, "train/loss")
    before = list(rundir.tensorboard.iterdir())
    sync.sync([rundir.path])
    assert list(rundir.tensorboard.iterdir()) == before, "what is complete is not written again"


CODE = """
class Lines:
    def __init__(self, about):
        self.file = (about.rundir.path / "lines.txt").open("w")
        print(about.project, sorted(about.config), file=self.file)

    def log(self, step, time_s, metrics):
        print(step, sorted(metrics), file=self.file)
        if metrics["train/loss"] == FAULTY:
            raise ValueError("the disk of the tracker is full")

    def flush(self):
        self.file.flush()

    def close(self, state):
        print(state and state.status, file=self.file)
        self.file.close()


def lines(about):
    return Lines(about)
"""


def a_run(outputs: Path, faulty: float | None) -> tuple[RunDir, Sending, dict[str, str]]:
    rundir = make_run(outputs, also=["lab.py:lines"])
    rundir.code.mkdir()
    (rundir.code / "lab.py").write_text(f"FAULTY = {faulty}\n{CODE}")
    rundir.config.write_text(rundir.config.read_text() + yaml.safe_dump({"code": {"lab": "0" * 64}}))
    config, problems = manifest.read_config(rundir), dict[str, str]()
    return rundir, Sending(rundir, bind(config["tracking"], "tracking")(), config, problems), problems


def test_a_function_of_the_users_is_a_tracker(outputs: Path) -> None:
    rundir, sending, problems = a_run(outputs, None)
    finish(rundir, range(1, 3))
    assert sending.send(rundir.read_state()) == []
    assert problems == {"lab.py:lines": ""}
    metrics = "['train/loss', 'train/tokens']"
    assert (rundir.path / "lines.txt").read_text().splitlines() == [
        "tests ['code', 'lora', 'outputs_dir', 'seed', 'tracking']", f"1 {metrics}", f"2 {metrics}", "completed",
    ]  # fmt: skip


def test_a_tracker_that_fails_is_named_and_disturbs_nothing(outputs: Path) -> None:
    rundir, sending, problems = a_run(outputs, 0.5)
    finish(rundir, range(1, 3))
    assert sending.send(rundir.read_state()) == ["lab.py:lines: ValueError: the disk of the tracker is full"]
    assert problems["lab.py:lines"]


def test_a_function_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lab.py").write_text(f"FAULTY = None\n{CODE}")
    words = ("model=tiny", "tracking=mlflow")
    assert "lab" in composed(*words, "tracking.also=[lab.py:lines]")["code"]
    assert composed(*words, "tracking.also=lab.py:lines")["tracking"]["also"] == "lab.py:lines"
    with pytest.raises(ConfigError, match=r"tracking.also=lab.py:line: defines no function 'line'. did you mean 'line"):
        composed(*words, "tracking.also=[lab.py:line]")
