"""Holding runs against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures.results import RUNS, a_run, config
from scipy import stats

from runner.cli import compare
from runner.config import choices
from runner.errors import ConfigError
from runner.report import leaderboard, page, ranking, statistics
from runner.report.results import Result


def test_seeds_are_averaged_and_differences_by_chance_are_not_significant():
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


def test_averaging_over_a_key_without_repetitions_gives_a_note():
    made = leaderboard.of([a_run("a", loss=1, lora__r=4, seed=0), a_run("b", loss=2, lora__r=8, seed=1)], by="seed")
    assert any("nothing to average" in note for note in made.notes)
    assert not made.has_means
    assert leaderboard.verdict(made.groups[1]) == "only one run: cannot test"


@pytest.mark.parametrize(
    ("key", "first"),
    [("loss", "low"), ("-loss", "high"), ("+tokens/s", "low"), ("tokens/s", "high"), ("lora.r", "low"),
     ("-r", "high"), ("eval/token_accuracy", "high"), ("eval_arc_easy/acc", "high")],
)  # fmt: skip
def test_the_better_direction_follows_from_the_name_or_the_sign(key: str, first: str):
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


# Parameters


def test_only_what_differs_is_shown_and_not_where_it_ran():
    runs = [
        a_run("a", loss=1, lora__r=4, seed=0, outputs_dir="/a", launcher__gpus=1, data__rows=5),
        a_run("b", loss=2, lora__r=8, seed=0, outputs_dir="/b", launcher__gpus=2, data__rows=5),
    ]
    assert leaderboard.of(runs).params == ["lora.r"]


def test_what_follows_from_a_group_is_left_out_unless_somebody_set_it():
    def of(name: str, loss: float, flat: dict[str, str]) -> Result:
        params, implied = choices.named(flat, {"quant": "4bit"} if "quant.kind" in flat else {})
        return Result(name, name, "completed", params=params, implied=implied, metrics={"eval/loss": loss})

    none = of("none", 1, {"quant._target_": "runner.models.quantization.none.none"})
    assert ranking.differing([none, of("4bit", 2, config())]) == ["quant"]
    assert ranking.differing([none, of("4bit", 2, config(quant__double="false"))]) == ["quant", "quant.double"]
    assert ranking.differing([of("a", 1, config()), of("b", 2, config(quant__double="false"))]) == ["quant.double"]


# What is refused


def test_all_faults_of_a_line_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        leaderboard.of(RUNS, where="lora.rr=4", metrics="eval/los", pareto="loss", by="eval/loss", sort="nothing/like")
    assert [fault.key for fault in caught.value.faults] == ["--where", "--metrics", "--pareto", "--by", "--sort"]
    assert "did you mean 'eval/loss'? available metrics: eval/loss" in str(caught.value)


def test_a_note_explains_why_numbers_may_not_be_comparable():
    runs = [a_run("a", loss=1, data__eval_rows=4, model="llama"), a_run("b", loss=2, data__eval_rows=8, model="qwen")]
    notes = " ".join(leaderboard.of(runs).notes)
    assert "data.eval_rows" in notes
    assert "tokenizer" in notes
    assert leaderboard.of(runs[:1]).notes == []


def test_runs_of_several_stores_are_compared_by_their_folders_with_a_note():
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


def test_the_marks_are_explained():
    runs = [a_run("a", loss=1.0, **{"eval/token_accuracy": 0.5}), a_run("b", loss=2.0, **{"eval/token_accuracy": 0.4})]
    assert leaderboard.of(runs).legend() == "★ best run: loss (smaller is better)"
    board = leaderboard.of(runs, pareto="token_accuracy,loss")
    marks = "◆ Pareto front of eval/token_accuracy (larger is better) and loss (smaller is better): "
    assert marks in board.legend()
    assert board.legend() in compare.markdown(board).splitlines()
    drawing = page.Drawing([{}, {}], [], (board.axes[0], board.axes[1]))
    assert page._data(board, drawing, "")["marks"] == board.legend()
