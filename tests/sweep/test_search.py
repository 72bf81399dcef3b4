"""Searches: the space, what is refused, how trials become runs, and what is told to Optuna of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TINY, prepared
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from runner.cli import main
from runner.errors import ConfigError, Fault
from runner.launch import prepare
from runner.sweep import algorithms, search, session, space
from runner.tracking import machine, metrics_log
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

WORDS = (
    "-m", "model=tiny", "data.max_length=128", "data.train_rows=64", "data.eval_rows=4", "train.sample_prompts=0",
)  # fmt: skip
RATES = "optim.learning_rate=tag(log,interval(1e-4,1e-1))"


def runner(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "runner", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=500)


def started(*words: str, cwd: Path) -> subprocess.Popen[bytes]:
    command, env = [sys.executable, "-m", "runner", *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.DEVNULL)


def study_of(sweep: SweepDir) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(sweep.search_journal))
    return optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))


def states(sweep: SweepDir) -> list[str]:
    return [rundir.read_state().status for rundir in sweep.rundirs()]


def written_rates(sweep: SweepDir) -> list[float]:
    import yaml

    return [yaml.safe_load(rundir.config.read_text())["optim"]["learning_rate"] for rundir in sweep.rundirs()]


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("k=interval(1e-5,1e-2)", FloatDistribution(1e-5, 1e-2)),
        ("k=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("k=int(interval(1,8))", IntDistribution(1, 8)),
        ("k=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("k=range(1,9)", IntDistribution(1, 8)),
        ("k=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("k=range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
        ("k=4,8,16", CategoricalDistribution(("4", "8", "16"))),
        ("k=choice(none,4bit)", CategoricalDistribution(("none", "4bit"))),
    ],
)
def test_hydras_syntax_becomes_optunas_distribution(text: str, distribution: Any):
    (dimension,) = space.dimensions(OverridesParser.create(), [text], {})
    assert dimension.distribution() == distribution
    again = space.dimensions(OverridesParser.create(), [], {"k": text.partition("=")[2]})
    assert [each.distribution() for each in again] == [distribution]


@pytest.mark.parametrize("value", [1.2345678901234567e-05, 0.1, 3.0, 1e-30])
def test_a_proposed_number_is_trained_to_the_last_digit(value: float):
    (dimension,) = space.dimensions(OverridesParser.create(), ["k=interval(0,1)"], {})
    override = OverridesParser.create().parse_override(dimension.override(value))
    assert override.value() == value


@pytest.mark.parametrize(
    ("swept", "more", "told"),
    [
        ([], {}, "the search space is empty"),
        (["k=8"], {}, "is a single value, not a range"),
        (["k=interval(2,1)"], {}, "has its ends in the wrong order\n    → put the smaller first: interval(1,2)"),
        (["k=interval(1,1)"], {}, "is an empty range"),
        (["k=range(2,1)"], {}, "is an empty range"),
        (["k=tag(log,interval(0,1))"], {}, "has no logarithm at its lower end"),
        (["k=tag(log,choice(1,2))"], {}, "cannot use tag(log, …): only intervals can"),
        (["k=tag(lin,interval(0,1))"], {}, "has an unknown tag: lin"),
        (["k=1,2"], {"k": "1,2"}, "is set twice"),
        ([], {"k": "interval(1"}, "is not valid in Hydra's sweep syntax"),
    ],
)
def test_a_space_that_is_none_is_refused(swept: list[str], more: dict[str, str], told: str):
    with pytest.raises(ConfigError) as refused:
        space.dimensions(OverridesParser.create(), swept, more)
    assert told in str(refused.value)


REFUSED = [
    (["search=tpe", RATES], "has no effect without -m"),
    (["-m", "search=tpe"], "the search space is empty"),
    (["-m", RATES], "search=random, tpe or asha draw from it"),
    (["-m", "search=tpe", "search.objective=eval/los", RATES], "did you mean 'eval/loss'"),
    (["-m", "search=tpe", "search.objective=[eval/loss,training seconds]", RATES], "2 objectives and 1 directions"),
    (["-m", "search=tpe", "search.direction=down", RATES], "must be one of minimize, maximize"),
    (["-m", "search=asha", RATES], "train.eval_steps"),
    (["-m", "search=asha", "train.eval_steps=4", RATES], "search.min_steps"),
    (["-m", "search=asha", "train.eval_steps=5", "train.max_steps=10", RATES], "no run would be paused"),
    (["-m", "search=asha", "train.eval_steps=5", "search.objective=train/mfu", RATES], "asha compares runs"),
    (["-m", "search=tpe", "lora.r=0,4"], "must be a whole number >= 1"),
    (
        ["-m", "search=tpe", "lora.r=interval(4,16)"],
        "error: lora.r=interval(4,16): must be a whole number >= 1, but "
        "this range contains fractions\n    → write 'lora.r=range(4,17)'",
    ),
    (["-m", "search=tpe", "lora.r=[4,8]"], "[4,8] is a single value, a list"),
    (
        ["-m", "search=tpe", "search.space={lora.r: [4,8]}"],
        "search.space.lora.r=[4, 8]: must be a string in Hydra's sweep syntax\n    → write lora.r: '4,8'",
    ),
    (
        ["-m", "search=tpe", RATES, "--cfg", "job", "--package", "search"],
        "--cfg=job: shows one configuration, but -m composes several\n    → leave -m out",
    ),
    (["-m", "search=tpe", "lora.rank=int(interval(1,4))"], "no such key"),
    (["-m", "search=tpe", "quant=4bit,9bit"], "did you mean '8bit'"),
    (["-m", "search=tpe", "tracking.run_name=a,b"], "cannot be searched over"),
    (["-m", "search=tpe", "outputs_dir=a,b"], "cannot be swept"),
    (["-m", "search=annealing", RATES], "no such option"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_a_search_that_cannot_be_is_refused_before_anything_is_there(tmp_path: Path, words: list[str], told: str):
    done = runner(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_may_be_an_objective_is_what_runs_log(tmp_path: Path, cache: Path):
    done = runner(*WORDS[1:], "train.max_steps=2", "hydra.run.dir=run", "tracking=offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rundir = RunDir(tmp_path / "run")
    logged = {name for record in metrics_log.read(rundir) for name in record} - {"step", "time"}
    elsewhere = algorithms.ON_CPU if set(algorithms.ON_CUDA) <= logged else algorithms.ON_CUDA
    assert logged == set(algorithms.METRICS) - {*elsewhere, "training seconds"}
    assert {metric for metric in algorithms.METRICS if search.value_of(rundir, metric) is None} == set(elsewhere)


@dataclass
class Played:
    """A launcher under which runs only write down how they ended."""

    end: Callable[[RunDir, int], dict[str, Any]]
    """(run, its number among those started) → the changes of its state."""
    started: list[RunDir] = field(default_factory=list)
    is_detached: bool = False

    def check(self, at_once: int | None = None) -> None:
        pass

    def serve(self, source: Any, *_: object) -> int:
        while rundir := source.next():
            self.started.append(rundir)
            rundir.write_state(**self.end(rundir, len(self.started)))
            source.ended(rundir)
        return 0


def completed(rundir: RunDir, number: int) -> dict[str, Any]:
    return {"status": "completed", "summary": {"eval/loss": 10.0 - number}}


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """Give a command whose runs are played; returns its exit code, and how many runs were started."""
    monkeypatch.chdir(tmp_path)

    def play(*words: str, end: Callable[[RunDir, int], dict[str, Any]] = completed) -> tuple[int, int]:
        launcher = Played(end)
        with monkeypatch.context() as patched:
            patched.setattr(prepare, "launcher_of", lambda _: launcher)
            return main.run([*WORDS, *words]), len(launcher.started)

    return play


SMALL = ("search=random", "search.trials=2", "train.max_steps=60", RATES, "lora.r=4,8", "sweep=it")


def test_a_search_goes_on_only_with_runs_that_can_be_compared(play: Any, capsys: pytest.CaptureFixture[str]):
    assert play(*SMALL) == (0, 2)
    for words, told in [
        (("train.max_steps=300",), "train.max_steps=60 (now 300)"),
        (("model=smollm2", "search.trials=3"), "(now runner.models.sources.gguf)"),
        (("lora=dora",), "lora.use_dora"),
        (("seed=1",), "seed=0 (now 1)"),
    ]:
        assert play(*SMALL, *words) == (2, 0), words
        said = capsys.readouterr().err
        assert told in said
        assert "or start a new one with sweep=NAME" in said
    same = ("search.trials=4", "tracking=offline", "launcher.parallel=2", "retry=true", "name=other")
    assert play(*SMALL, *same) == (0, 2)


def test_a_search_that_noted_nothing_of_its_runs_goes_on(play: Any):
    assert play(*SMALL) == (0, 2)
    study = study_of(SweepDir(Path("outputs/sweeps/it")))
    about = study.user_attrs["about"]
    study.set_user_attr("about", {key: about[key] for key in ("space", "objectives")})
    assert play(*SMALL, "search.trials=3") == (0, 1)
    assert play(*SMALL, "train.max_steps=300") == (2, 0), "from then on it is noted"


def test_categories_of_a_group_leave_its_keys_to_the_search(play: Any):
    assert play("search=random", "search.trials=3", "quant=none,4bit", "sweep=it") == (0, 2)
    assert play("search=random", "search.trials=3", "quant=none,4bit", "sweep=it") == (0, 0)


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
    assert play(*SMALL, "search.objective=train/mfu") == (1, 2)
    said = capsys.readouterr().out
    assert "is completed but counts as failed: it has not logged train/mfu" in said
    assert "best  " not in said


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
    assert sweep.rundirs()[1].read_state().status == "running", "it came to no end"
    proposed = [trial.params for trial in study_of(sweep).trials]
    assert len(proposed) == 2
    done = runner(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = study_of(sweep).trials
    assert [trial.params for trial in trials[:2]] == proposed
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [rundir.read_state().attempt for rundir in sweep.rundirs()] == [1, 2, 1]


ASHA = (*WORDS, "train.eval_steps=4", "search=asha", "search.min_steps=4", "search.sampler=random", RATES, "sweep=it")


@pytest.mark.slow
def test_asha_pauses_what_is_behind_and_takes_up_what_comes_to_be_ahead(tmp_path: Path, cache: Path):
    """No run can come to its end here, however late the search looks: it ends when one has been seen to go on."""
    driver = started(*ASHA, "train.max_steps=100000", "search.trials=3", cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: any(rundir.read_state().attempt > 1 for rundir in sweep.rundirs()), seconds=300)
    assert len(sweep.rundirs()) == 3, "each got its first steps before one went on"
    assert runner("cancel", "it", cwd=tmp_path).returncode == 0
    assert driver.wait(100) == 130
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


@pytest.mark.slow
def test_a_failed_trial_is_told_and_tried_again_when_asked_to(tmp_path: Path, cache: Path):
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
def test_a_run_that_was_killed_is_not_said_to_have_finished(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2000", "search=random", "search.trials=1", RATES, "sweep=it", "tracking=offline")
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 1)
    os.kill(sweep.rundirs()[0].read_state().pid, signal.SIGKILL)
    assert driver.wait(60) == 1
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
    assert driver.wait(60) == 1
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
    assert driver.wait(60) == 130
    assert states(sweep) == ["pruned", "killed"]
    assert sweep.rundirs()[1].read_state().reason.startswith("cancelled by ")


@pytest.mark.slow
def test_a_search_that_cannot_go_on_lets_what_runs_save(tmp_path: Path, cache: Path):
    words = (*WORDS, "train.max_steps=2000", "search=random", "search.trials=9", RATES, "sweep=it", "tracking=offline",
             "search.at_once=2")  # fmt: skip
    driver = started(*words, cwd=tmp_path)
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "it")
    until(lambda: len(sweep.rundirs()) == 2 and all(rundir.read_state().step >= 1 for rundir in sweep.rundirs()))
    sweep.manifest.write_text("no longer JSON")
    first, second = sorted((tmp_path / "outputs" / "sweeps" / "it").glob("00*"))
    RunDir(first).prune_request.write_text("given up")
    assert driver.wait(100) == 1
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
    assert driver.wait(60) == 130
    assert states(sweep) == ["killed"]
    assert [trial.state for trial in study_of(sweep).trials] == [TrialState.RUNNING], "it is taken up again"


def mlflow_runs(folder: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def until(is_true: Any, seconds: float = 100) -> None:
    give_up_at = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < give_up_at, "it never came to that"
        time.sleep(0.1)


def test_a_value_that_is_no_number_is_none(tmp_path: Path):
    rundir = RunDir(tmp_path)
    rundir.metrics.write_text(json.dumps({"step": 1, "eval/loss": float("nan")}) + "\n")
    assert search.value_of(rundir, "eval/loss") is None
    assert search.value_of(rundir, "eval/token_accuracy") is None
