"""Records go to a tracker of the user's, from the copy of the code that the run keeps."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import composed
from fixtures.mirrored_runs import finish, make_run, outputs

from runner.config.bind import bind
from runner.errors import ConfigError
from runner.tracking import manifest
from runner.tracking.also.sending import Sending
from runner.tracking.rundir import RunDir

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
