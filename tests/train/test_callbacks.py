"""Callbacks: what they are given and when; one that fails, one that is slow, one that has other parameters."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed, prepared
from fixtures.stopped_runs import preempted_run

from runner.cli import main
from runner.errors import ConfigError
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import callbacks, worker

LAB = """
import json

import torch

def watch(event, step, metrics, folder):
    torch.rand(step + 1)  # random numbers of its own do not change those of the training
    with open(folder / "watched.jsonl", "a") as file:
        file.write(json.dumps([event, step, metrics]) + "\\n")
    metrics["train/loss"] = 0.0

def broken(event, step):
    if event == "evaluation" and step:
        raise ValueError("no more")

def leaves(event):
    raise SystemExit(0)

def other(event, loss):
    pass

def defaults(*, step, wanted=3, **others):
    assert sorted(others) == ["event", "folder", "metrics"]
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab.py").write_text(LAB)
    return tmp_path


def watched(rundir: RunDir) -> list[Any]:
    return [json.loads(line) for line in (rundir.path / "watched.jsonl").read_text().splitlines()]


def test_a_callback_follows_the_run(lab: Path, cache: Path):
    options = (*TINY, "train.callbacks=[lab.py:watch,lab.py:defaults]", "train.max_steps=4", "train.eval_steps=2",
               "train.save_steps=3", "train.logging_steps=2")  # fmt: skip
    rundir = prepared(lab / "run", *options)
    (lab / "lab.py").write_text("raise SystemExit('the run has its own copy')")
    assert worker.work(rundir) == 0
    events = watched(rundir)
    assert [(event, step) for event, step, _ in events] == [
        ("start", 0), ("evaluation", 0), ("step", 2), ("evaluation", 2), ("save", 3), ("step", 4),
        ("evaluation", 4), ("save", 4), ("end", 4),
    ]  # fmt: skip
    latest: dict[str, float] = {}
    records = iter(metrics_log.read(rundir))
    for event, step, metrics in events:
        if event in ("step", "evaluation"):
            record = next(records)
            assert record.pop("step") == step
            latest |= {name: value for name, value in record.items() if name != "time"}
        assert metrics == latest, "a change by an earlier callback reaches nobody"


def test_a_resumed_run_tells_its_callbacks_what_it_had_recorded(lab: Path, cache: Path):
    options = (*TINY, "train.max_steps=4", "train.save_steps=2", "lora.lora_dropout=0.2")
    rundir = preempted_run(lab / "run", *options, "train.callbacks=[lab.py:watch]")
    first = watched(rundir)
    assert worker.work(rundir) == 0
    events = watched(rundir)[len(first) :]
    assert [(event, step) for event, step, _ in events] == [
        ("start", 3), ("step", 4), ("evaluation", 4), ("save", 4), ("end", 4)
    ]  # fmt: skip
    assert events[0][2] == first[-1][2]
    without = prepared(lab / "without", *options)
    assert worker.work(without) == 0
    weights = [(each.model / "adapter_model.safetensors").read_bytes() for each in (without, rundir)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken", r"lab\.py:broken failed at evaluation, step 1: ValueError: no more \(.*lab\.py, line 14\)"),
        ("leaves", r"lab\.py:leaves failed at start, step 0: SystemExit: 0"),
    ],
)
def test_a_callback_that_fails_fails_the_run(lab: Path, cache: Path, name: str, problem: str):
    rundir = prepared(lab / "run", *TINY, f"train.callbacks=[lab.py:{name}]", "train.max_steps=2", "train.eval_steps=1")
    assert worker.work(rundir) == 1
    state = rundir.read_state()
    assert state.status == "failed"
    assert re.search(problem, state.reason), state.reason


def test_a_slow_callback_is_reported_once(caplog: pytest.LogCaptureFixture):
    clock = itertools.count(step=2.0)
    quick = callbacks.Callbacks({"lab.py:quick": lambda **_: None}, now=lambda: 0.0)
    slow = callbacks.Callbacks({"lab.py:slow": lambda **_: None}, now=lambda: next(clock))
    with caplog.at_level(logging.WARNING, logger="runner"):
        for each in (quick, slow):
            for event in ("start", "step", "step"):
                each.call(event, 0)
    (record,) = [record for record in caplog.records if "callbacks" in record.message]
    assert "lab.py:slow took" in record.message
    assert "% of the time so far (2.0 s)" in record.message


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[lab.py:wach]", "did you mean 'watch'"),
        ("[nowhere.py:watch]", "no such file or module"),
        ("[watch]", r"train\.callbacks=\[lab\.py:watch\]"),
        ("[lab.py:watch,lab.py:watch]", "twice"),
    ],
)
def test_what_is_no_callback_is_refused(lab: Path, value: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        composed(*TINY, f"train.callbacks={value}")


def test_other_parameters_are_refused_by_the_plan_and_by_the_run(
    lab: Path, cache: Path, capsys: pytest.CaptureFixture[str]
):
    options = (*TINY, "train.callbacks=[lab.py:other]", "train.max_steps=1")
    assert main.run(["plan", *options]) == 2
    problem = capsys.readouterr().err
    assert "train.callbacks=lab.py:other: its parameter 'loss' is unknown" in problem
    assert "any of the parameters event, step, metrics, folder" in problem
    assert worker.work(prepared(lab / "run", *options)) == 2
