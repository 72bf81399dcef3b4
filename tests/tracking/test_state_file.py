"""state.json: what it may contain, and the time that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import DamagedError
from runner.tracking import state_file
from runner.tracking.state_file import State


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"status": "asleep"}, "unknown status 'asleep'"),
        ({"status": "running", "stap": 3}, "unknown keys: stap"),
        ({"status": "running", "step": "3"}, "step is '3'"),
        ({"step": 3}, "unknown status None"),
    ],
)
def test_other_contents_are_damage(content: dict[str, object], problem: str, tmp_path: Path):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=f"is damaged: {problem}\n    → resume it"):
        state_file.read(path, "resume it")


def test_what_was_written_is_read_with_the_time_of_the_change(tmp_path: Path):
    path = tmp_path / "state.json"
    written = state_file.write(path, State("running", step=3, total_steps=9))
    assert written.updated > 0
    assert state_file.read(path, "") == written


def test_the_time_that_is_left_is_that_of_the_steps_so_far(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_file.time, "time", lambda: 1000.0)
    state = State("running", step=10, total_steps=40, seconds=20.0, updated=995.0)
    assert state.remaining_s() == 60 - 5
    assert State("running", step=10, total_steps=40, seconds=20.0, updated=1050.0).remaining_s() == 60
    assert State("running", step=0, total_steps=40, seconds=3.0).remaining_s() is None
    assert State("completed", step=40, summary={"best step": 25}).model_step == 25
