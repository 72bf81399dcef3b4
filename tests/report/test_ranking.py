"""Order, fronts against brute force, and importance."""

from __future__ import annotations

import random

from fixtures.results import a_run

from runner.report import leaderboard, ranking
from runner.report.columns import Goal

LOSS = Goal("eval/loss", is_larger_better=False)


# Order, front, importance


def test_runs_are_ordered_the_better_first_and_the_unfinished_last():
    runs = [a_run("b", loss=2), a_run("dead", "killed", loss=0.1), a_run("none"), a_run("a", loss=1)]
    assert [run.run for run in ranking.ordered(runs, LOSS)] == ["a", "b", "none", "dead"]
    best = ranking.best(runs, LOSS)
    assert best is not None
    assert best.run == "a", "a run that was killed is not the best, however it stood"


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


def test_importance_is_unknown_if_every_run_has_its_own_value():
    runs = [a_run(str(n), loss=float(n), lora__r=4 * n) for n in range(1, 5)]
    assert ranking.importance(runs, ["lora.r"], LOSS) == []


def test_a_difference_that_the_table_does_not_show_puts_no_run_on_the_front():
    small, large = {"memory/peak_rss_gib": 1.001}, {"memory/peak_rss_gib": 2.0}
    runs = [a_run("a", loss=1.00001, **large), a_run("b", loss=1.00002, **small), a_run("c", loss=0.9, **large)]
    goals = [LOSS, Goal("memory/peak_rss_gib", False)]
    assert [run.run for run in ranking.front(runs, goals)] == ["c", "b"]
    assert ranking.fronts(runs, goals)["eval/loss", "memory/peak_rss_gib"] == [2, 1]
    seconds = [a_run("d", loss=2.0, **{"train/seconds": 61.2}), a_run("e", loss=1.0, **{"train/seconds": 61.4})]
    assert [run.run for run in ranking.front(seconds, [Goal("train/seconds", False), LOSS])] == ["e"]


def test_runs_of_different_losses_are_ranked_by_their_accuracy():
    accuracies = ranking.PREFERENCES
    runs = [a_run("a", loss=0.6, task="dpo", task__beta=0.1, **{accuracies: 0.7}),
            a_run("b", loss=9.0, task="dpo", task__beta=0.5, **{accuracies: 0.8})]  # fmt: skip
    board = leaderboard.of(runs)
    assert (board.goal, board.best.run) == (Goal(accuracies, is_larger_better=True), "b")
    assert "the runs differ in task.beta, part of the loss" in board.notes[0]
    alike = [
        a_run(name, loss=loss, task="dpo", lora__r=loss, **{accuracies: 0.7}) for name, loss in (("a", 1), ("b", 2))
    ]
    assert leaderboard.of(alike).goal.key == "eval/loss"
    tokens = [a_run("a", loss=1, task__train_on="all"), a_run("b", loss=2, task__train_on="last")]
    assert leaderboard.of(tokens).goal.key == "eval/loss"
    assert "their losses are not comparable" in leaderboard.of(tokens).notes[0]
    for_answers = [a_run("a", loss=-1, task="grpo", task__beta=0.1), a_run("b", loss=0, task="grpo", task__beta=0)]
    assert not leaderboard.of(for_answers).notes
    heads = [a_run(str(ratio), loss=ratio, task="reward", task__head_lr_ratio=ratio) for ratio in (1, 9)]
    assert leaderboard.of(heads).goal.key == "eval/loss"
