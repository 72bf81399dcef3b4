"""Holding runs against each other: statistics against scipy, fronts against brute force, conditions by example."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from runner.config import choices
from runner.errors import ConfigError
from runner.report import charts, columns, condition, leaderboard, ranking, statistics
from runner.report.columns import Goal
from runner.report.results import Result

LOSS = Goal("eval/loss", is_larger_better=False)


def a_run(name: str, status: str = "completed", loss: float | None = None, **values: Any) -> Result:
    """A result; the names of metrics have a slash, all else is a parameter (``__`` is a dot)."""
    params = {key.replace("__", "."): str(value) for key, value in values.items() if "/" not in key}
    metrics = {key: value for key, value in values.items() if "/" in key}
    known = {} if loss is None else {"eval/loss": loss}
    return Result(name, name, status, params={"task": "sft", **params}, metrics={**metrics, **known})


# Statistics


def test_students_distribution_is_that_of_scipy():
    for freedom in (1, 1.5, 2, 3.7, 9, 40, 1000):
        for t in (0.0, 0.3, 1.0, 2.5, 12.0):
            assert statistics.upper_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)
        for probability in (0.5, 0.8, 0.975, 0.999):
            expected = stats.t.ppf(probability, freedom)
            assert statistics.quantile(probability, freedom) == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_intervals_and_welchs_test_are_those_of_scipy():
    draw = random.Random(0)
    for _ in range(40):
        first = [draw.gauss(0, 1) for _ in range(draw.randint(2, 8))]
        second = [draw.gauss(0.5, 3) for _ in range(draw.randint(2, 8))]
        low, high = stats.t.interval(0.95, len(first) - 1, loc=sum(first) / len(first), scale=stats.sem(first))
        found = statistics.mean(first)
        assert found.half_width is not None
        assert (found.value - found.half_width, found.value + found.half_width) == pytest.approx((low, high))
        assert statistics.welch(first, second) == pytest.approx(stats.ttest_ind(first, second, equal_var=False).pvalue)


def test_one_value_alone_says_nothing_of_the_spread():
    assert statistics.mean([3.0]) == statistics.Mean(1, 3.0, None)
    assert statistics.welch([1.0], [2.0, 3.0]) is None
    assert statistics.welch([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert statistics.welch([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_seeds_are_averaged_and_settings_that_differ_by_chance_are_said_so():
    near, far = (1.00, 1.02, 1.04), (2.00, 2.02, 2.04)
    losses = {4: near, 8: tuple(loss + 0.01 for loss in near), 16: far}
    runs = [
        a_run(f"{r}-{seed}", loss=loss, lora__r=r, seed=seed) for r in losses for seed, loss in enumerate(losses[r])
    ]
    runs.append(a_run("dead", "failed", lora__r=16, seed=9))
    made = leaderboard.of(runs, by="seed")
    assert [group.setting for group in made.groups] == [{"lora.r": "4"}, {"lora.r": "8"}, {"lora.r": "16"}]
    best, same, worse = made.groups
    assert best.is_best
    assert best.means["eval/loss"].value == pytest.approx(1.02)
    assert same.p == pytest.approx(stats.ttest_ind(losses[4], losses[8], equal_var=False).pvalue)
    verdicts = [leaderboard.verdict(group).split(" (")[0] for group in made.groups]
    assert verdicts == ["★ best", "no significant difference", "worse"]
    assert worse.means["eval/loss"].n == 3
    assert len(worse.results) == 4, "the failed one is in the group and not in its mean"
    counts = [row[made.group_titles().index("n")] for row in made.group_rows()]
    assert counts == ["3", "3", "3 of 4"]


def test_averaging_over_what_was_never_repeated_is_said_to_be_idle():
    made = leaderboard.of([a_run("a", loss=1, lora__r=4, seed=0), a_run("b", loss=2, lora__r=8, seed=1)], by="seed")
    assert any("nothing to average" in note for note in made.notes)
    assert not made.has_means
    assert leaderboard.verdict(made.groups[1]) == "only one run: cannot test"


# Order, front, importance


def test_runs_are_ordered_the_better_first_and_the_unfinished_last():
    runs = [a_run("b", loss=2), a_run("dead", "killed", loss=0.1), a_run("none"), a_run("a", loss=1)]
    assert [run.run for run in ranking.ordered(runs, LOSS)] == ["a", "b", "none", "dead"]
    best = ranking.best(runs, LOSS)
    assert best is not None
    assert best.run == "a", "a run that was killed is not the best, however it stood"


@pytest.mark.parametrize(
    ("key", "first"),
    [("loss", "low"), ("-loss", "high"), ("+tokens/s", "low"), ("tokens/s", "high"), ("lora.r", "low"),
     ("-r", "high"), ("eval/token_accuracy", "high"), ("eval_arc_easy/acc", "high")],
)  # fmt: skip
def test_the_better_end_is_known_by_the_name_or_said(key: str, first: str):
    accuracies = "eval/token_accuracy", "eval_arc_easy/acc"
    runs = [
        a_run("high", loss=2, lora__r=16, **{"train/tokens_per_second": 9.0, **dict.fromkeys(accuracies, 0.9)}),
        a_run("low", loss=1, lora__r=8, **{"train/tokens_per_second": 5.0, **dict.fromkeys(accuracies, 0.5)}),
    ]
    assert leaderboard.of(runs, sort=key).results[0].run == first


def test_runs_of_a_search_are_ordered_by_what_it_looked_for():
    key, searched = "eval/token_accuracy", {"search__direction": "maximize"}
    for objective in (key, f"['{key}', 'train/tokens']"):
        wanted = {"search__objective": objective, **searched}
        runs = [a_run("a", loss=1, **{key: 0.5}, **wanted), a_run("b", loss=2, **{key: 0.9}, **wanted)]
        assert leaderboard.of(runs).best.run == "b"
        assert leaderboard.of(runs, sort="loss").best.run == "a"
        assert leaderboard.of([*runs, a_run("c", loss=3, lora__r=1)]).best.run == "a", "not all of one search"


def test_a_setting_that_ran_once_is_not_the_best_of_those_that_ran_often():
    runs = [a_run(f"often-{seed}", loss=2 + seed / 10, lora__r=4, seed=seed) for seed in range(3)]
    made = leaderboard.of([*runs, a_run("once", loss=1, lora__r=8, seed=0)], by="seed")
    assert [(group.setting["lora.r"], group.is_best) for group in made.groups] == [("4", True), ("8", False)]


def test_sorting_by_a_parameter_does_not_change_which_is_best():
    made = leaderboard.of([a_run("a", loss=2, lora__r=4), a_run("b", loss=1, lora__r=8)], sort="lora.r")
    assert ([run.run for run in made.results], made.best.run) == (["a", "b"], "b")


def test_sorting_the_other_way_round_does_not_make_the_worst_run_the_best():
    runs = [a_run("a", loss=2, **{"m/x": 1.0}), a_run("b", loss=1, **{"m/x": 2.0})]
    made = leaderboard.of(runs, sort="-loss")
    assert ([run.run for run in made.results], made.best.run) == (["a", "b"], "b")
    assert leaderboard.as_json(made)["larger_is_better"] is False
    assert leaderboard.of(runs, sort="-m/x").best.run == "b", "a name that says nothing is taken at the sign"
    assert leaderboard.of(runs, sort="+m/x").best.run == "a"


def test_runs_that_have_measured_nothing_say_so():
    runs = [a_run("a", "pending"), a_run("b", "pending", lora__r=8)]
    for options in ({"metrics": "loss,nope"}, {"sort": "loss"}, {"where": "eval/loss<1"}):
        with pytest.raises(ConfigError, match="these runs have no metrics yet") as refused:
            leaderboard.of(runs, **options)
        assert "did you mean" not in str(refused.value)


def test_a_condition_that_no_run_meets_says_which_values_there_are():
    runs = [a_run("tiny one", loss=n, quant=quant, lora__r=n) for n, quant in enumerate(["4bit", "8bit"] * 6)]
    with pytest.raises(
        ConfigError, match=r"none of the 12 runs matches this condition\n.*quant: 4bit, 8bit; lora.r: 0 to 11"
    ):
        leaderboard.of(runs, where="quant=4bits and r>=0")
    assert len(leaderboard.of(runs, where="name~tiny").results) == 12, "name is what the run is called"


@pytest.mark.parametrize(
    ("values", "said"),
    [((0.56, 0.56), "0.56 GiB"), ((0.5, 0.6, 0.7), "0.60 ± 0.25 GiB")],
)
def test_two_repetitions_say_nothing_of_the_spread_of_a_machine(values: tuple[float, ...], said: str):
    assert leaderboard.mean_text("memory/peak_rss_gib", statistics.mean(values)) == said
    assert "±" in leaderboard.mean_text("eval/loss", statistics.mean(values))


def test_where_nothing_but_the_seed_differs_there_is_one_group_and_nothing_to_hold_it_against():
    made = leaderboard.of([a_run(str(seed), loss=1 + seed, seed=seed) for seed in range(3)], by="seed")
    assert made.is_one_setting
    assert made.group_titles() == ["n", "loss"]
    assert made.group_rows() == [["3", "2.0000 ± 2.4841"]]
    assert "nothing else differs" in made.group_heading()
    several = [a_run(f"{r}-{seed}", loss=r + seed, lora__r=r, seed=seed) for r in (4, 8) for seed in range(2)]
    made = leaderboard.of(several, by="seed")
    assert not made.is_one_setting
    assert made.group_titles() == ["lora.r", "n", "loss", "compared with best"]
    assert made.group_heading() == "mean ± 95 % confidence interval over seed"


def test_values_are_short_for_people_and_exact_for_programs():
    rates = ("0.0013981961408994052", "0.0012")
    made = leaderboard.of([a_run(rate, loss=n, lr=rate, seed=1 + n) for n, rate in enumerate(rates)])
    assert [row[1:3] for row in made.rows()] == [["0.001398", "1"], ["0.0012", "2"]]
    (first, second) = leaderboard.as_json(made)["runs"]
    assert (first["lr"], first["seed"], first["is_best"], first["step"]) == (0.0013981961408994052, 1, True, 0)
    assert [type(second[key]) for key in ("seed", "is_best", "step")] == [int, bool, int]
    names, rows = made.table()
    assert dict(zip(names, rows[0], strict=True))["lr"] == rates[0]


def test_the_axis_of_what_is_ranked_by_is_one_of_numbers():
    heights, ticks = charts._scaled([5.531812345678, None, 5.6])
    assert (heights, [text for _, text in ticks]) == ([0.0, None, 1.0], ["5.532", "5.566", "5.6"])
    assert charts._scaled([1.0, 1.0]) == ([0.5, 0.5], [(0.5, "1")])
    assert charts._positions("lr", ["0.0013981961408994052", "0.0012"])[1] == [(0.0, "0.0012"), (1.0, "0.001398")]


def test_the_front_is_what_nothing_beats():
    draw = random.Random(1)
    runs = [a_run(str(n), loss=draw.random(), **{"m/x": draw.random(), "m/y": draw.random()}) for n in range(120)]
    goals = [LOSS, Goal("m/x", is_larger_better=True), Goal("m/y", is_larger_better=False)]
    costs = {run.run: tuple(goal.cost(run) for goal in goals) for run in runs}
    expected = {
        name for name, own in costs.items()
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in costs.values())
    }  # fmt: skip
    assert {run.run for run in ranking.front(runs, goals)} == expected
    assert 1 < len(expected) < len(runs)


def test_equal_runs_are_on_the_front_together_and_unfinished_ones_never():
    runs = [a_run("a", loss=1, **{"m/x": 1.0}), a_run("b", loss=1, **{"m/x": 1.0}), a_run("c", "failed", loss=0)]
    assert [run.run for run in ranking.front(runs, [LOSS, Goal("m/x", False)])] == ["a", "b"]


def test_the_front_of_each_pair_is_the_front_of_these_two():
    """Of few values, so that many runs are equal in one goal or in both."""
    draw = random.Random(3)
    runs = [
        a_run(str(n), "completed" if n % 7 else "failed", loss=draw.randint(0, 9), lora__r=draw.choice([4, 8, "x"]),
              **{"m/x": draw.randint(0, 9), **({} if n % 5 == 0 else {"m/y": draw.randint(0, 3)})})
        for n in range(300)
    ]  # fmt: skip
    goals = [LOSS, Goal("m/x", is_larger_better=True), Goal("m/y", is_larger_better=False), Goal("lora.r", False)]
    found = ranking.fronts(runs, goals)
    assert len(found) == 10
    for (one, other), places in found.items():
        pair = [goal for key in (one, other) for goal in goals if goal.key == key]
        assert [runs[place] for place in places] == ranking.front(runs, pair), (one, other)
    costs = [(-run.metrics["m/x"], run.metrics["eval/loss"]) for run in runs if run.is_completed]
    assert len(found["eval/loss", "m/x"]) == sum(not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
                                                 for x, y in costs)  # fmt: skip


def test_importance_finds_what_the_loss_depends_on():
    draw = random.Random(2)
    runs = []
    for n in range(200):
        rate, r, seed = 10 ** draw.uniform(-5, -2), draw.choice([4, 8, 16]), draw.randint(0, 4)
        loss = 50.0 if n % 20 == 0 else (0.4 * abs(r - 16) / 16 + draw.gauss(0, 0.02) + (rate > 1e-3))
        runs.append(a_run(str(n), loss=loss, lora__r=r, seed=seed, optim__learning_rate=rate))
    found = dict(ranking.importance(runs, ["seed", "lora.r", "optim.learning_rate"], LOSS))
    assert list(found) == ["optim.learning_rate", "lora.r", "seed"]
    assert found["optim.learning_rate"] > 0.3
    assert found["seed"] < 0.05


def test_importance_is_not_told_where_every_run_has_a_value_of_its_own():
    runs = [a_run(str(n), loss=float(n), lora__r=4 * n) for n in range(1, 5)]
    assert ranking.importance(runs, ["lora.r"], LOSS) == []


# Parameters


def test_only_what_differs_is_shown_and_not_where_it_ran():
    runs = [
        a_run("a", loss=1, lora__r=4, seed=0, outputs_dir="/a", launcher__gpus=1, data__rows=5),
        a_run("b", loss=2, lora__r=8, seed=0, outputs_dir="/b", launcher__gpus=2, data__rows=5),
    ]
    assert leaderboard.of(runs).params == ["lora.r"]


def config(**changes: str) -> dict[str, str]:
    """Flattened, as a run folder or MLflow has it."""
    four = {"quant._target_": "runner.models.quantization.four_bit", "quant.kind": "nf4", "quant.double": "true",
            "quant.compute_dtype": "auto"}  # fmt: skip
    return {**four, **{key.replace("__", "."): value for key, value in changes.items()}}


def test_a_group_is_named_by_the_option_that_was_chosen():
    changed, implied = choices.named(config(quant__compute_dtype="float32"), {"quant": "4bit"})
    assert changed["quant"] == "4bit"
    assert "quant._target_" not in changed
    assert implied == {"quant.kind", "quant.double"}
    pretrained = {"model._target_": "runner.models.sources.pretrained", "model.path": "/mine", "model.revision": "null"}
    assert choices.named(pretrained, {"model": "qwen"})[0]["model"] == "qwen"
    assert choices.named({"optim._target_": "my_lab.my_sgd", "optim.lr": "1"}, {"optim": "mine"})[0]["optim"] == "mine"


def test_a_run_of_the_first_version_is_named_by_its_overrides_or_the_function():
    old = {
        "quant._target_": "runner.quant.four_bit",
        "lora._target_": "runner.lora.lora",
        "task._target_": "runner.tasks.sft",
    }
    found, _ = choices.named(old, choices.of_overrides(["quant=fp4", "lora.r=8"]))
    assert found == {"quant": "fp4", "lora": "lora", "task": "sft"}


def test_what_follows_from_a_group_is_left_out_unless_somebody_set_it():
    def of(name: str, loss: float, flat: dict[str, str]) -> Result:
        params, implied = choices.named(flat, {"quant": "4bit"} if "quant.kind" in flat else {})
        return Result(name, name, "completed", params=params, implied=implied, metrics={"eval/loss": loss})

    none = of("none", 1, {"quant._target_": "runner.models.quantization.none"})
    assert ranking.differing([none, of("4bit", 2, config())]) == ["quant"]
    assert ranking.differing([none, of("4bit", 2, config(quant__double="false"))]) == ["quant", "quant.double"]
    assert ranking.differing([of("a", 1, config()), of("b", 2, config(quant__double="false"))]) == ["quant.double"]


# Conditions


RUNS = [
    a_run("a", loss=1.5, lora__r=4, quant="none", optim__learning_rate="1e-4", data__path="/x/my rows.jsonl"),
    a_run("b", loss=2.5, lora__r=16, quant="4bit", optim__learning_rate="0.0002"),
    a_run("c", "failed", lora__r=16, quant="none", optim__learning_rate="0.0001"),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.r>=8", "bc"), ("lora.r > 4 and quant=4bit", "b"), ("quant=4bit or lora.r=4", "ab"),
        ("not status=failed", "ab"), ("status!=completed", "c"), ("(lora.r=4 or lora.r=16) and quant=none", "ac"),
        ("lora.r=4 or lora.r=16 and quant=4bit", "ab"), ("learning_rate=0.0001", "ac"), ("loss<2", "a"),
        ("loss!=1.5", "bc"), ("data.path~rows", "a"), ("data.path='/x/my rows.jsonl'", "a"), ("r==4.0", "a"),
        ("not (quant=none and lora.r=4)", "bc"), ("NOT lora.r<=4 AND status=failed", "c"), ("label=a", "a"),
    ],
)  # fmt: skip
def test_a_condition_chooses_runs(text: str, expected: str):
    meets = condition.parse(text, lambda key: columns.resolve(key, RUNS, "--where"))
    assert "".join(run.run for run in RUNS if meets(lambda key, run=run: columns.value(run, key))) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora.r>=", "a value is missing after 'lora.r>='"), ("lora.r", "a comparison is missing after 'lora.r'"),
        ("(lora.r=4", r"a \) is missing"), ("lora.r=4 quant=none", "unexpected 'quant'"),
        ("lora.r=4 and", "the condition is incomplete"), ("=4", "a key is missing before '='"),
        ("lora.rr=4", "did you mean"),
        ("quant<4bit", "'<' compares numbers, and '4bit' is not a number"), ("lora.r='4", "syntax error at: '4"),
        ("__import__('os').system('true')", "no run has the key '__import__'"),
    ],
)  # fmt: skip
def test_a_condition_that_says_nothing_is_refused(text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        condition.parse(text, lambda key: columns.resolve(key, RUNS, "--where"))


def test_a_key_that_may_mean_several_things_is_asked_back():
    runs = [a_run("a", loss=1, lora__r=4, model__r=2)]
    with pytest.raises(ConfigError, match=r"'r' is ambiguous(?s:.*)use one of lora\.r, model\.r"):
        leaderboard.of(runs, where="r=4")


# What is refused


def test_all_faults_of_a_line_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        leaderboard.of(RUNS, where="lora.rr=4", metrics="eval/los", pareto="loss", by="eval/loss", sort="nothing/like")
    assert [fault.key for fault in caught.value.faults] == ["--where", "--metrics", "--pareto", "--by", "--sort"]
    assert "did you mean 'eval/loss'? available metrics: eval/loss" in str(caught.value)


def test_runs_of_different_tasks_are_not_compared():
    runs = [a_run("a", loss=1), a_run("b", loss=2, task="pretrain"), a_run("c", loss=3)]
    with pytest.raises(ConfigError, match=r"different tasks \(2 of sft, 1 of pretrain\)(?s:.*)--where task=sft"):
        leaderboard.of(runs)
    assert [run.run for run in leaderboard.of(runs, where="task=pretrain").results] == ["b"]


def test_where_nothing_is_completed_it_says_what_there_is():
    with pytest.raises(ConfigError, match=r"none of the 2 runs is completed: 1 running, 1 queued"):
        leaderboard.of([a_run("a", "running", loss=1), a_run("b", "queued")])
    with pytest.raises(ConfigError, match="none of the 3 runs matches this condition"):
        leaderboard.of(RUNS, where="lora.r>100")
    with pytest.raises(ConfigError, match=r"no completed run has the metric eval/loss(?s:.*)--sort: acc/x"):
        leaderboard.of([a_run("a", **{"acc/x": 1.0})])


def test_it_is_said_why_numbers_side_by_side_may_not_be_alike():
    runs = [a_run("a", loss=1, data__eval_rows=4, model="llama"), a_run("b", loss=2, data__eval_rows=8, model="qwen")]
    notes = " ".join(leaderboard.of(runs).notes)
    assert "data.eval_rows" in notes
    assert "tokenizer" in notes
    assert leaderboard.of(runs[:1]).notes == []


def test_runs_of_several_stores_are_compared_by_their_folders_and_that_is_said():
    runs = [
        replace(a_run(name, loss=1, lora__r=n), store=store)
        for n, (name, store) in enumerate({"a": "http://one", "b": "sqlite:////two.db", "c": ""}.items())
    ]
    (note,) = leaderboard.of(runs).notes
    assert "the runs are in 2 MLflow stores (http://one, sqlite:////two.db): no store has all of them" in note
    assert leaderboard.of(runs[1:]).notes == []


def test_a_ranking_by_few_held_out_rows_says_so():
    runs = [replace(a_run(f"{n}", loss=n, lora__r=n), held_out_rows=rows) for n, rows in ((1.0, 1), (2.0, 50))]
    assert any("only 1 row is held out" in note for note in leaderboard.of(runs).notes)
    assert not any(
        "held out" in note for note in leaderboard.of([replace(run, held_out_rows=50) for run in runs]).notes
    )
