"""Several ranks of one run, started by us: true endings."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import prepared
from fixtures.ranks_of_a_run import OPTIONS, several, worked


@pytest.mark.parametrize(
    ("end", "code", "status", "reason"),
    [
        ("die", 1, "killed", "one of the 2 ranks was killed (SIGKILL or out of memory); "),
        pytest.param("drop", 75, "preempted", "stopped by SIGTERM; ", marks=pytest.mark.slow),
    ],
)
def test_the_launcher_records_the_end_of_a_rank_0_that_recorded_nothing(
    tmp_path: Path, cache: Path, end: str, code: int, status: str, reason: str
):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    found, said = worked(rundir, end, "3", "0")
    state = rundir.read_state()
    assert (found, state.status) == (code, status), said
    assert state.reason == f"{reason}nothing was trained yet"
    assert not rundir.is_alive()
    assert "Traceback" not in said


def test_a_run_that_was_given_up_is_so_for_all_ranks(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    rundir.prune_request.write_text("given up at step 3")
    code, said = worked(rundir)
    assert (code, rundir.read_state().status) == (0, "pruned"), said
    assert "Traceback" not in said


def test_ctrl_c_saves_once_and_is_recorded(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"), "train.max_steps=500")
    code, said = worked(rundir, "interrupt", "3", "1")
    state = rundir.read_state()
    assert (code, state.status) == (130, "killed"), said
    assert state.reason == f"interrupted; the state is saved at step {state.step}"
    assert "Traceback" not in said
    assert said.count(f"resume={rundir.path}") == 1, "only rank 0 speaks"


def test_ranks_of_a_run_that_was_cancelled_meanwhile_train_nothing(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    rundir.cancel_request.write_text("cancelled before it started by me")  # seconds pass until rank 0 holds the folder
    rundir.write_state(status="killed", reason="cancelled before it started by me")
    code, said = worked(rundir)
    assert code == 130, said
    assert (rundir.read_state().status, rundir.read_state().attempt) == ("killed", 0)
    assert said.count("is not started: cancelled before it started by me") == 1


@pytest.mark.slow
def test_a_rank_that_raises_is_the_reason(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    code, said = worked(rundir, "raise", "2", "1")
    state = rundir.read_state()
    assert (code, state.status) == (1, "failed"), said
    assert state.reason == "rank 1: ZeroDivisionError: too deep a thought"
    assert "Traceback" not in said
    assert "Traceback" in rundir.rank_log(1).read_text()
    code, said = worked(rundir)
    assert (code, rundir.read_state().status) == (0, "completed"), said
    assert not rundir.rank_failure(1).exists()
    assert "too deep a thought" in rundir.rank_log(1).read_text(), "the log of the first attempt is kept"


def test_rank_0_that_raises_is_the_reason_itself(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    code, said = worked(rundir, "raise", "2", "0")
    state = rundir.read_state()
    assert (code, state.status, state.reason) == (1, "failed", "ZeroDivisionError: too deep a thought"), said
