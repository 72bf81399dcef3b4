"""Searches: the space, what is refused, how trials become runs, and what is told to Optuna of them."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, prepared, until
from fixtures.searches import RATES, WORDS, completed, mlflow_runs, play, runner, started, study_of
from optuna.trial import TrialState

from runner.sweep import search, space, trials
from runner.tracking import machine, metrics_log
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


def states(sweep: SweepDir) -> list[str]:
    return [rundir.read_state().status for rundir in sweep.rundirs()]


def written_rates(sweep: SweepDir) -> list[float]:
    import yaml

    return [yaml.safe_load(rundir.config.read_text())["optim"]["learning_rate"] for rundir in sweep.rundirs()]


SMALL = ("search=random", "search.trials=2", "train.max_steps=60", RATES, "lora.r=4,8", "sweep=it")


@pytest.mark.parametrize(
    ("gpu", "metric"), [(False, "memory/peak_allocated_gib"), (True, "memory/peak_rss_gib")], ids=["CPU", "GPU"]
)
def test_an_objective_of_the_other_device_is_refused(
    play: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: bool, metric: str
):
    monkeypatch.setattr(machine, "has_cuda", lambda: gpu)
    assert play(*SMALL, f"search.objective={metric}") == (2, 0)
    assert f"search.objective={metric}: is not logged on this machine" in capsys.readouterr().err
    assert not Path("outputs").exists()
    monkeypatch.setattr(machine, "has_cuda", lambda: not gpu)
    assert play(*SMALL, f"search.objective={metric}")[0] == 1, "it is begun"


def test_a_run_that_was_given_up_is_in_the_table_with_its_last_loss(play: Any, capsys: pytest.CaptureFixture[str]):
    def end(rundir: RunDir, number: int) -> dict[str, Any]:
        for step, loss in ((0, 5.0), (4, 4.125)):
            metrics_log.append(rundir, {"step": step, "time": 0.0, "eval/loss": loss})
        return {"status": "pruned", "reason": "given up at step 4"}

    assert play(*SMALL, "search.trials=1", end=end) == (0, 1)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " pruned " in line]
    assert "4.1250" in row


def test_who_resumes_a_run_that_was_given_up_wants_it(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=2")
    rundir.prune_request.write_text("given up at step 1")
    rundir.write_state(status="pruned")
    done = runner("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rundir.read_state().status == "completed"


@pytest.mark.slow
def test_every_trial_is_a_run_and_the_same_command_goes_on(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2", "search=tpe", "search.startup_trials=2", RATES, "lora.r=4,8")
    done = runner(*words, "search.trials=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "tpe-lora.r+optim.learning_rate")
    study = study_of(sweep)
    losses = [rundir.read_state().summary["eval/loss"] for rundir in sweep.rundirs()]
    assert [trial.value for trial in study.trials] == losses
    assert [trial.params["optim.learning_rate"] for trial in study.trials] == written_rates(sweep)
    assert f"best     eval/loss {min(losses):.6g}" in done.stdout
    more = runner(*words, "search.trials=5", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert [trial.state for trial in study_of(sweep).trials] == [TrialState.COMPLETE] * 5
    assert len(set(written_rates(sweep))) == 5, "none is proposed twice"
    assert [rundir.read_state().attempt for rundir in sweep.rundirs()] == [1] * 5
    other = runner(*words, "lora.lora_alpha=4,8", "sweep=tpe-lora.r+optim.learning_rate", cwd=tmp_path)
    assert other.returncode == 2
    assert "the existing search has another space" in other.stderr
    runs = mlflow_runs(tmp_path)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert [run.data.tags["mlflow.parentRunId"] for run in runs if run not in parents] == [parents[0].info.run_id] * 5


@pytest.mark.slow
def test_killed_with_what_runs_it_goes_on_where_it_was(tmp_path: Path, cache: Path):
    """The second run halts at its first checkpoint, so that it cannot end before it is killed."""
    words = (*WORDS, "train.max_steps=200", "train.save_steps=5", "search=random", "search.trials=3", RATES, "sweep=it")
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    driver = started(*words, cwd=tmp_path)
    until(lambda: len(sweep.rundirs()) == 2 and sweep.rundirs()[1].saved_step())
    pid = sweep.rundirs()[1].read_state().pid
    os.kill(pid, signal.SIGSTOP)
    driver.kill()
    driver.wait()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not sweep.rundirs()[1].is_alive())
    assert sweep.rundirs()[1].read_state().status in ("running", "killed"), "it came to no end"
    proposed = [trial.params for trial in study_of(sweep).trials]
    assert len(proposed) == 2
    done = runner(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = study_of(sweep).trials
    assert [trial.params for trial in trials[:2]] == proposed
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [rundir.read_state().attempt for rundir in sweep.rundirs()] == [1, 2, 1]


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_repeated_with_retry(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=8", "search=random", "search.trials=2", "optim.learning_rate=1e-3,1e30")
    done = runner(*words, "search.trials=8", cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "random-optim.learning_rate")
    assert sorted(states(sweep)) == ["completed", "failed"]
    assert done.returncode == 1, done.stderr
    by_rate = {trial.params["optim.learning_rate"]: trial.state for trial in study_of(sweep).trials}
    assert by_rate == {"0.001": TrialState.COMPLETE, "1e+30": TrialState.FAIL}
    assert len(study_of(sweep).trials) == 8, "twins are told without being run again"
    assert [rundir.read_state().attempt for rundir in sweep.rundirs()] == [1, 1]
    again = runner(*words, "search.trials=8", "retry=true", cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    assert sorted(rundir.read_state().attempt for rundir in sweep.rundirs()) == [1, 2]
    third = runner(*words, "search.trials=8", "retry=true", cwd=tmp_path)
    assert third.returncode == 1, third.stderr
    assert sorted(rundir.read_state().attempt for rundir in sweep.rundirs()) == [1, 3]
    assert TrialState.WAITING not in {trial.state for trial in study_of(sweep).trials}


@pytest.mark.slow
def test_a_killed_run_is_not_reported_as_finished(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2000", "search=random", "search.trials=1", RATES, "sweep=it", "tracking=offline")
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 1)
    os.kill(sweep.rundirs()[0].read_state().pid, signal.SIGKILL)
    assert driver.wait() == 1
    assert states(sweep) == ["killed"]


@pytest.mark.slow
def test_a_run_that_is_cancelled_alone_does_not_end_the_search(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2000", "search=random", "search.trials=2", RATES, "sweep=it", "tracking=offline")
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 1)
    assert runner("cancel", f"it/{sweep.rundirs()[0].path.name}", cwd=tmp_path).returncode == 0
    until(lambda: len(sweep.rundirs()) == 2 and sweep.rundirs()[1].read_state().step >= 1)
    sweep.rundirs()[1].prune_request.write_text("given up")
    assert driver.wait() == 1
    assert states(sweep) == ["killed", "pruned"]


@pytest.mark.slow
def test_a_search_that_is_cancelled_proposes_nothing_more_and_spares_what_is_done(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2000", "search=random", "search.trials=9", RATES, "sweep=it", "tracking=offline")
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 1)
    sweep.rundirs()[0].prune_request.write_text("given up")
    until(lambda: len(sweep.rundirs()) == 2 and sweep.rundirs()[1].read_state().step >= 1)
    done = runner("cancel", "it", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert driver.wait() == 130
    assert states(sweep) == ["pruned", "killed"]
    assert sweep.rundirs()[1].read_state().reason.startswith("cancelled by ")


@pytest.mark.slow
def test_a_search_that_cannot_go_on_lets_what_runs_save(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2000", "search=random", "search.trials=9", RATES, "sweep=it", "tracking=offline",
             "search.at_once=2")  # fmt: skip
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: len(sweep.rundirs()) == 2 and all(rundir.read_state().step >= 1 for rundir in sweep.rundirs()))
    with (sweep.path / "search.journal").open("a") as journal:
        journal.write("no longer JSON\n")
    first, second = sorted((tmp_path / "outputs" / "sweeps" / "it").glob("00*"))
    RunDir(first).prune_request.write_text("given up")
    assert driver.wait() == 1
    assert [RunDir(folder).read_state().status for folder in (first, second)] == ["pruned", "preempted"]
    assert RunDir(second).saved_step() == RunDir(second).read_state().step


def test_the_plan_of_a_search_is_that_of_one_run(tmp_path: Path, cache: Path):
    done = runner("plan", "-m", "model=tiny", "search=tpe", RATES, "search.trials=20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 runs" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_objectives_end_in_a_front(tmp_path: Path, cache: Path):
    done = runner(
        *WORDS, "train.max_steps=2", "search=random", "search.trials=3", RATES, "lora.r=2,32", "tracking=offline",
        "search.objective=[eval/loss,memory/peak_rss_gib]", "search.direction=[minimize,minimize]", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sweep,) = map(SweepDir, (tmp_path / "outputs" / "sweeps").iterdir())
    ends: dict[str, tuple[float, float]] = {}
    for rundir in sweep.rundirs():
        last = {name: value for record in metrics_log.read(rundir) for name, value in record.items()}
        ends[rundir.path.name] = last["eval/loss"], last["memory/peak_rss_gib"]
    assert len(ends) == 3
    front = {
        name for name, (loss, memory) in ends.items()
        if not any(other != (loss, memory) and other[0] <= loss and other[1] <= memory for other in ends.values())
    }  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("best ")]
    assert {line[-1] for line in lines} == front
    losses = {line[-1]: float(line[2].rstrip(",")) for line in lines}
    assert losses == pytest.approx({name: ends[name][0] for name in front}, rel=1e-5)


@pytest.mark.slow
def test_only_one_process_proposes(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=100000", "search=random", RATES, "sweep=it", "tracking=offline")
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 1)
    second = runner(*words, cwd=tmp_path)
    assert second.returncode == 2
    assert "another process runs this search" in second.stderr
    driver.send_signal(signal.SIGINT)
    assert driver.wait() == 130
    assert states(sweep) == ["killed"]
    assert [trial.state for trial in study_of(sweep).trials] == [TrialState.RUNNING], "it is taken up again"
