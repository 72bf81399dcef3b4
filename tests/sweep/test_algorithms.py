"""Options of the group search."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import composed
from fixtures.searches import RATES, WORDS, runner, searchable_is_logged

from runner.cli import main
from runner.sweep import algorithms, trials
from runner.tracking import machine
from runner.tracking.rundir import RunDir

REFUSED = [
    (["search=tpe", RATES], "has no effect without -m"),
    (["-m", "search=tpe"], "the search space is empty"),
    (["-m", RATES], "search=random, tpe or asha draw from it"),
    (["-m", "search=tpe", "search.objective=eval/los", RATES], "did you mean 'eval/loss'"),
    (["-m", "search=tpe", "search.objective=eval/rewards/margins", RATES], "not a metric that runs of task=sft log"),
    (["-m", "search=tpe", "search.objective=eval/token_accuracy", RATES], "→ set search.direction=maximize"),
    (["-m", "search=tpe", "search.direction=maximize", RATES], "→ set search.direction=minimize"),
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
def test_a_search_that_cannot_be_is_refused_before_anything_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], told: str
):
    monkeypatch.chdir(tmp_path)
    assert main.run(words) == 2
    said = capfd.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


PAIRS = ("data=chitchat_pairs", "data.max_length=128")
OF_EACH_TASK = [
    ("task=sft",),
    ("task=dpo", *PAIRS),
    ("task=orpo", *PAIRS),
    ("task=rloo", "task.rewards=[runner.tasks.example_rewards:lowercase_share]", "data=chitchat_prompts",
     "task.max_completion_length=4"),
]  # fmt: skip
"""Those whose runs are not compared in tests of their own (tests/tasks, tests/train)."""


@pytest.mark.parametrize("task", OF_EACH_TASK, ids=lambda words: words[0])
def test_what_may_be_an_objective_is_what_runs_log(tmp_path: Path, cache: Path, task: tuple[str, ...]):
    done = runner(*task, *WORDS[1:], "train.max_steps=2", "hydra.run.dir=run", "tracking=offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rundir = RunDir(tmp_path / "run")
    allowed = searchable_is_logged(rundir)
    elsewhere = algorithms.ON_CPU if machine.has_cuda() else algorithms.ON_CUDA
    assert {metric for metric in allowed if trials.value_of(rundir, metric) is None} == set(elsewhere)


def test_a_task_of_your_own_may_log_any_evaluation_metric(tmp_path: Path):
    node = {"objective": ["eval/bits_per_token", "eval/loss"], "direction": ["minimize", "minimize"]}
    lab = tmp_path / "my_lab.py"
    lab.write_text("from runner.tasks.sft import sft\n\n\ndef focal():\n    return sft(train_on='all')\n")
    ours, own = composed("task=sft"), composed(f"code={lab}", "task=focal")
    assert not list(algorithms._metric_faults(node, own))
    (fault,) = algorithms._metric_faults(node, ours)
    assert (fault.key, fault.value) == ("search.objective", "eval/bits_per_token")
    (fault,) = algorithms._metric_faults({**node, "direction": ["maximize", "maximize"]}, own)
    assert "eval/loss" in fault.problem
