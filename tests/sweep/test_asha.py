"""Successive halving without training: who goes on, who pauses, who goes on later; and what it costs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import until
from fixtures.searches import RATES, WORDS, mlflow_runs, runner, started, study_of
from optuna.trial import TrialState

from runner.sweep.asha import Halving, Rungs
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

RUNGS = Rungs(min_steps=2, reduction_factor=3, metric="eval/loss", is_larger_better=False)
LAST = 18


def a_run(folder: Path, name: str, status: str = "running", **losses: float) -> RunDir:
    """A run that was evaluated at these steps: ``s2=1.5``."""
    rundir = RunDir(folder / name)
    rundir.path.mkdir(parents=True, exist_ok=True)
    lines = [{"step": int(step[1:]), "time": 0.0, "eval/loss": loss} for step, loss in losses.items()]
    rundir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rundir.write_state(status=status, step=lines[-1]["step"] if lines else 0, total_steps=LAST)
    return rundir


@pytest.mark.parametrize(
    ("steps", "top"), [([], -1), ([0, 1], -1), ([2], 0), ([5], 0), ([2, 6], 1), ([17], 1), ([18], 2)]
)
def test_rungs_are_at_powers(steps: list[int], top: int):
    assert RUNGS.top(dict.fromkeys(steps, 1.0)) == top


def test_the_best_third_goes_on_and_a_larger_value_is_better_where_that_is_wanted():
    reached = {name: {2: float(name)} for name in "123456"}
    assert RUNGS.best(0, reached) == ["1", "2"]
    assert Rungs(2, 3, "eval/token_accuracy", is_larger_better=True).best(0, reached) == ["6", "5"]
    assert RUNGS.best(0, {"1": {2: 1.0}, "2": {6: 0.0}}) == [], "of one, no third; who jumped the step is not there"
    assert RUNGS.best(0, {"1": {2: 1.0}}, at_least=1) == ["1"]


def test_what_is_no_number_is_behind_all_others():
    nan, accuracy = float("nan"), Rungs(2, 3, "eval/token_accuracy", is_larger_better=True)
    assert RUNGS.best(0, {"a": {2: 3.0}, "b": {2: nan}, "c": {2: 1.0}}) == ["c"]
    assert accuracy.best(0, {"a": {2: nan}, "b": {2: 1.0}, "c": {2: 2.0}}) == ["c"]


def test_one_run_comes_to_its_end_though_the_best_have_failed(tmp_path: Path):
    runs = [a_run(tmp_path, name, s2=loss) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    halving = Halving(RUNGS, runs)
    for rundir, status in zip(runs, ("failed", "pruned", "pruned"), strict=True):
        rundir.write_state(status=status)
        halving.ended(rundir, status)
    assert halving.promoted(is_last=False) is None
    assert halving.promoted(is_last=True) == (runs[1], 0)


def test_a_run_that_has_lost_the_value_of_a_rung_is_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good, lossy = a_run(tmp_path, "a", s2=1.0, s4=1.0, s6=1.0), a_run(tmp_path, "b", s4=9.0, s6=0.5, s8=0.4)
    halving = Halving(RUNGS, [good, lossy])
    assert (halving.top(good), halving.top(lossy)) == (1, -1)
    assert RUNGS.best(1, halving.reached, at_least=2) == [good.path]
    halving.read(lossy)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("b/metrics.jsonl: eval/loss of step 2 is lost; the run is not compared with others")


def test_a_worse_run_pauses_and_resumes_when_it_is_among_the_best(tmp_path: Path):
    runs = [a_run(tmp_path, "a", s2=1.0), a_run(tmp_path, "b", s2=2.0)]
    halving = Halving(RUNGS, runs)
    assert not halving.continues(runs[0]), "the best of two is no third"
    said = runs[0].prune_request.read_text()
    assert said == "paused at step 2: eval/loss 1 is not among the best third of the runs so far"
    for rundir in runs:
        rundir.write_state(status="pruned")
        halving.ended(rundir, "pruned")
    assert halving.promoted(is_last=False) is None
    third = a_run(tmp_path, "c", s2=3.0)
    halving.read(third)
    assert not halving.continues(third)
    assert halving.promoted(is_last=False) == (runs[0], 0), "of three one goes on: the first, which pauses"
    halving.resume(runs[0])
    assert (runs[0].read_state().status, runs[0].prune_request.exists()) == ("pending", False)
    assert halving.promoted(is_last=False) is None
    runs[1].write_state(status="running")
    halving.resume(runs[1])
    assert runs[1].read_state().status == "running", "somebody has resumed it"


def test_at_the_end_at_least_one_run_is_brought_to_its_end(tmp_path: Path):
    runs = [a_run(tmp_path, "a", "pruned", s2=2.0), a_run(tmp_path, "b", "pruned", s2=1.0)]
    halving = Halving(RUNGS, runs)
    assert halving.promoted(is_last=False) is None
    assert halving.promoted(is_last=True) == (runs[1], 0)
    halving.ended(a_run(tmp_path, "c", "completed", s2=9.0), "completed")
    assert halving.promoted(is_last=True) is None


def test_a_run_at_its_last_step_is_not_given_up(tmp_path: Path):
    rundir = a_run(tmp_path, "a", s2=1.0, s6=1.0, s18=1.0)
    assert Halving(RUNGS, [rundir]).continues(rundir)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_many_is_found_in_half_of_the_steps(tmp_path: Path, seed: int):
    """Losses whose order changes a little on the way, one run at a time, as a queue drives it."""
    draw = random.Random(seed)
    ends = [draw.random() for _ in range(12)]
    noise = [{2: draw.gauss(0, 0.05), 6: draw.gauss(0, 0.02), 18: 0.0} for _ in ends]
    halving, steps, names = Halving(RUNGS, []), 0, iter(range(12))
    while True:
        is_last = sum(1 for _ in tmp_path.iterdir()) == 12
        if found := halving.promoted(is_last=is_last):
            rundir = found[0]
            halving.resume(rundir)
        elif is_last:
            break
        else:
            rundir = a_run(tmp_path, str(next(names)))
        number = int(rundir.path.name)
        for step in (2, 6, 18):
            if step in halving.reached.get(rundir.path, {}):
                continue
            known = halving.reached.get(rundir.path, {})
            a_run(
                tmp_path,
                rundir.path.name,
                **{f"s{s}": v for s, v in {**known, step: ends[number] + noise[number][step]}.items()},
            )
            steps += step - max(known, default=0)
            halving.read(rundir)
            if not halving.continues(rundir):
                break
        status = "pruned" if rundir.prune_request.exists() else "completed"
        rundir.write_state(status=status)
        halving.ended(rundir, status)
    completed = [n for n in range(12) if 18 in halving.reached[tmp_path / str(n)]]
    assert min(ends) in [ends[n] for n in completed]
    assert steps <= 12 * 18 / 2


ASHA = (*WORDS, "train.eval_steps=4", "search=asha", "search.min_steps=4", "search.sampler=random", RATES, "sweep=it")


@pytest.mark.slow
def test_asha_pauses_what_is_behind_and_takes_up_what_comes_to_be_ahead(tmp_path: Path, cache: Path):
    """No run can come to its end here, however late the search looks: it ends when one has been seen to go on."""
    driver = started(*ASHA, "train.max_steps=100000", "search.trials=3", cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: any(rundir.read_state().attempt > 1 for rundir in sweep.rundirs()))
    assert len(sweep.rundirs()) == 3, "each got its first steps before one went on"
    assert runner("cancel", "it", cwd=tmp_path).returncode == 0
    assert driver.wait() == 130
    paused = [rundir for rundir in sweep.rundirs() if rundir.read_state().status == "pruned"]
    assert paused
    told = {trial.user_attrs.get("folder"): trial.state for trial in study_of(sweep).trials}
    for rundir in paused:
        state = rundir.read_state()
        assert state.reason.startswith("paused at step ")
        assert rundir.saved_step() == state.step
        assert told[rundir.path.name] == TrialState.PRUNED

    def in_mlflow() -> set[str | None]:
        tags = [run.data.tags for run in mlflow_runs(tmp_path)]
        told = {each["runner.folder"]: each["runner.status"] for each in tags if "runner.status" in each}
        return {told.get(str(rundir.path)) for rundir in paused}

    until(lambda: in_mlflow() == {"pruned"})


@pytest.mark.slow
def test_asha_brings_one_run_to_its_end_and_that_once(tmp_path: Path, cache: Path):
    """Whether the search looks in time, so that the run pauses and goes on, or too late: it is completed."""
    words = (*ASHA, "train.max_steps=40", "search.trials=1", "tracking=offline")
    done = runner(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    (rundir,) = sweep.rundirs()
    before = rundir.read_state()
    assert (before.status, before.step) == ("completed", 40)
    assert study_of(sweep).trials[-1].state == TrialState.COMPLETE
    again = runner(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert rundir.read_state() == before
