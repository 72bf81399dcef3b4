"""How trials become runs, and how their results are reported to Optuna."""

# ruff: noqa: F401, F811 - fixtures are imported and requested by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, prepared
from fixtures.searches import completed, play
from test_search import SMALL

from runner.errors import ConfigError, Fault
from runner.sweep import session, trials
from runner.tracking.rundir import RunDir


def test_failed_trials_are_failed_until_they_come_to_something(play: Any, capsys: pytest.CaptureFixture[str]):
    def end(rundir: RunDir, number: int) -> dict[str, Any]:
        return {"status": "failed", "reason": "as asked"} if number == 1 else completed(rundir, number)

    assert play(*SMALL, end=end) == (1, 2)
    capsys.readouterr()
    assert play(*SMALL) == (1, 0), "nothing was done about it"
    assert "retry with retry=true" in capsys.readouterr().out
    assert play(*SMALL, "retry=true") == (0, 1)
    assert play(*SMALL) == (0, 0)


def test_a_proposal_that_cannot_be_run_has_failed(play: Any, monkeypatch: pytest.MonkeyPatch):
    prepare = session.Session.composed

    def refusing(session: session.Session, batch: Any, first: int) -> Any:
        if len(batch) == 1 and first == 1:
            raise ConfigError(Fault("lora.r", "is none that can be run"))
        return prepare(session, batch, first)

    monkeypatch.setattr(session.Session, "composed", refusing)
    assert play(*SMALL) == (1, 1)
    assert play(*SMALL) == (1, 0)


def test_an_objective_that_was_not_logged_fails_the_search(play: Any, capsys: pytest.CaptureFixture[str]):
    assert play(*SMALL, "search.objective=train/mfu", "search.direction=maximize") == (1, 2)
    said = capsys.readouterr().out
    assert "is completed but counts as failed: it has not logged train/mfu" in said
    assert "best  " not in said


def test_only_what_failed_is_asked_for_anew_by_a_search(play: Any):
    ends = [{"status": "failed"}, {"status": "killed"}]

    def end(rundir: RunDir, number: int) -> dict[str, Any]:
        rundir.prune_request.write_text("given up")
        return ends[number - 1]

    assert play(*SMALL, end=end) == (1, 2)
    given_up: list[bool] = []

    def look(rundir: RunDir, number: int) -> dict[str, Any]:
        given_up.append(rundir.prune_request.exists())
        return completed(rundir, number)

    assert play(*SMALL, "retry=true", end=look) == (0, 2)
    assert given_up == [True, False], "the killed one goes on first, as it was"


def test_a_value_that_is_no_number_is_none(tmp_path: Path):
    rundir = prepared(tmp_path / "run", *TINY)
    rundir.metrics.write_text(json.dumps({"step": 1, "eval/loss": float("nan")}) + "\n")
    assert trials.value_of(rundir, "eval/loss") is None
    assert trials.value_of(rundir, "eval/token_accuracy") is None
