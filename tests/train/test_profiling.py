"""Profiles: the steps that were asked for, in files that other programs read; the speed of the run leaves them out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from conftest import TINY, composed, prepared
from test_loop import Recorded, parts_of

from runner.errors import ConfigError, Preempted
from runner.train import inputs, loop, worker
from runner.train.checkpoint import Progress
from runner.train.options import Options

RECORDED = (*TINY, "train.profile=2", "train.profile_start=2")


def test_the_chosen_steps_are_recorded(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    rundir = prepared(tmp_path / "run", *RECORDED, "train.max_steps=4")
    assert worker.work(rundir) == 0
    assert f"profile of the steps 2 to 3: {rundir.profile / 'summary.txt'}" in capsys.readouterr().err
    with gzip.open(rundir.profile / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step#AdamW.step")]
    assert len(steps) == 2
    assert any(event.get("name") == "aten::mm" for event in events)
    first, second, *_ = (rundir.profile / "summary.txt").read_text().splitlines()
    assert first.startswith("steps 2 to 3: ")
    assert "% of the time in operations on the CPU" in second
    assert "aten::" in (rundir.profile / "operations.txt").read_text()


def test_profiled_steps_do_not_count_in_the_speed(tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *RECORDED, "train.max_steps=5")
    with parts.profile.running():
        loop.train(parts, Progress(), Recorded().hooks())
    assert parts.meter.timing.steps == 2, "of five steps, the first is no measure, and two were profiled"
    assert parts.profile._profiler is None


def test_a_profile_that_is_cut_short_is_dropped(tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *TINY, "train.profile=4", "train.profile_start=1", "train.max_steps=6")
    with pytest.raises(Preempted), parts.profile.running():
        loop.train(parts, Progress(), Recorded(stop_at=2).hooks())
    assert parts.profile._profiler is None
    assert not parts.profile.folder.exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("train.profile=2 train.profile_start=4", "the steps 4 to 5 would be recorded, and the run has 4"),
        ("train.profile_start=2", "has no effect without train.profile"),
        ("train.profile_memory=true", "has no effect without train.profile"),
    ],
)
def test_what_would_record_nothing_is_refused(words: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        composed(*TINY, "train.max_steps=4", *words.split())


def test_the_memory_of_a_cpu_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from runner.train import devices

    monkeypatch.setattr(devices, "pick", lambda: torch.device("cpu"))
    with pytest.raises(ConfigError, match="records the memory of CUDA devices, and the run is on cpu"):
        inputs.inputs(Options(composed(*RECORDED, "train.profile_memory=true", "train.max_steps=4")))
