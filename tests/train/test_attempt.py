"""What a run writes while it trains, and what is refused before: records, the state, samples, other data."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY, prepared
from fixtures.stopped_runs import SHORT, preempted_run

from runner import terminal
from runner.signals import Stop
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import attempt, outcome, text_generation, worker


def rows_file(path: Path, count: int, answer: str) -> str:
    rows = [{"question": f"what is {n}?", "reply": f"{answer} {n * n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_changed_rows_are_refused_on_resume(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "rows.jsonl"
    options = (*SHORT, "data=local", f"data.path={rows_file(path, 60, 'it is')}", "data/format=prompt_completion",
               "data.format.prompt=question", "data.format.completion=reply")  # fmt: skip
    rundir = preempted_run(tmp_path / "run", *options)
    before, records = rundir.read_state(), rundir.metrics.read_bytes()
    rows_file(path, 60, "that makes")
    assert worker.work(rundir) == 2
    assert "has changed since this run began (digest" in caplog.text
    assert "restore the data, or start a new run" in caplog.text
    assert (rundir.read_state(), rundir.metrics.read_bytes()) == (before, records)
    rows_file(path, 60, "it is")
    assert worker.work(rundir) == 0


def test_a_resumed_run_uses_its_own_copy_of_a_function(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture):
    code = tmp_path / "rows.py"
    code.write_text("def to_text(row):\n    return row['question'] + row['reply']\n")
    path = rows_file(tmp_path / "rows.jsonl", 60, "it is")
    options = (*SHORT, "data=local", f"data.path={path}", "data/format=custom", "task=pretrain",
               f"data.format.function={code}:to_text")  # fmt: skip
    rundir = preempted_run(tmp_path / "run", *options)
    changed = "def to_text(row):\n    return row['reply'] + row['question']\n"
    kept = rundir.code / "rows.py"
    original = kept.read_text()
    kept.write_text(changed)
    assert worker.work(rundir) == 2
    assert "was edited after the run began" in caplog.text
    assert rundir.read_state().status == "preempted"
    kept.write_text(original)
    code.write_text(changed)
    assert worker.work(rundir) == 0
    assert rundir.read_state().status == "completed"


def test_how_far_a_run_is_gets_written_at_most_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rundir, now = prepared(tmp_path / "run", *TINY), [1000.0]
    written: list[int] = []
    write_state = RunDir.write_state

    def counted(run: RunDir, **changes: Any) -> Any:
        written.append(changes["step"])
        return write_state(run, **changes)

    monkeypatch.setattr(RunDir, "write_state", counted)
    monkeypatch.setattr(attempt, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))
    made: Any = SimpleNamespace(total_steps=100)
    each = attempt.STATE_EVERY_S / 4
    with (
        Stop() as stop,
        attempt._writing_hooks(rundir, made, outcome.Clock(0.0), stop, [], rundir.identity()) as hooks,
    ):
        for step in range(1, 100):
            hooks.record(step, {"train/loss": 1.0})
            now[0] += each
    assert written == [*range(1, 100, 4), 99], "every fourth, and the last"
    assert rundir.read_state().step == 99
    assert [record["step"] for record in metrics_log.read(rundir)] == list(range(1, 100)), "no record is left out"


def test_the_last_checkpoints_are_kept(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=7", "train.save_steps=2", "train.save_total_limit=2")
    assert worker.work(rundir) == 0
    assert sorted(path.name for path in rundir.checkpoints.iterdir()) == ["step-000006", "step-000007"]


def test_the_time_of_each_part_is_in_the_summary_and_samples_show_their_progress(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, *_: Any, **__: Any) -> Any:
        return lambda *counts: calls.setdefault(what, []).append(counts)

    monkeypatch.setattr(terminal, "progress", progress)
    rundir = prepared(tmp_path / "run", *TINY[:-1], "train.max_steps=1", "train.sample_prompts=2",
                      "train.sample_tokens=3")  # fmt: skip
    assert worker.work(rundir) == 0
    for moment in ("before", "after"):
        tokens = calls[f"generating samples {moment} training: token"]
        assert tokens == [(number, 3) for number in range(1, len(tokens) + 1)]
    assert calls["evaluating"] == [(0, 2), (1, 2), (2, 2)] * 2
    parts = rundir.read_state().summary["part seconds"]
    assert set(parts) == {"loading", "samples", "evaluation", "training", "saving"}
    assert all(seconds > 0 for seconds in parts.values())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "time of each part" in line]
    assert all(part in line for part in parts)


def test_a_stop_while_the_untrained_model_answers_does_not_wait(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    rundir = prepared(tmp_path / "run", *SHORT)

    def answering(*_: object, **__: object) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(text_generation, "generate", answering)
    assert worker.work(rundir) == 75
