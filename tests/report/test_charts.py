"""The pictures."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.compared_runs import a_sweep, here, played, said
from fixtures.results import a_run

from runner.report import charts, leaderboard, page
from runner.report.curves import Curve


def test_the_axis_of_what_is_ranked_by_is_one_of_numbers():
    heights, ticks = charts._scaled([5.531812345678, None, 5.6])
    assert (heights, [text for _, text in ticks]) == ([0.0, None, 1.0], ["5.532", "5.566", "5.6"])
    assert charts._scaled([1.0, 1.0]) == ([0.5, 0.5], [(0.5, "1")])
    assert charts._positions("lr", ["0.0013981961408994052", "0.0012"])[1] == [(0.0, "0.0012"), (1.0, "0.001398")]


def test_pictures_are_written(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for n in range(6):
        played(sweep, 4 * (1 + n % 2), 1.0 + n, seed=n, label="$x_n")
    code, _, err = said(capsys, "--png", "pictures")
    assert (code, err) == (0, "")
    written = sorted(path.name for path in Path("pictures").iterdir())
    assert written == ["importance.png", "loss.png", "parallel.png", "tradeoff.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in Path("pictures").iterdir())


def test_pictures_name_the_runs_and_the_units():
    from matplotlib.figure import Figure

    of_run = {"memory/peak_rss_gib": 1.5, "eval/perplexity": 3.0}
    runs = [a_run(f"run-{n}", loss=1.0 + n, lora__r=n, **of_run) for n in range(12)]
    board = leaderboard.of(runs, pareto="memory,loss")
    drawing = page.Drawing([{"eval": Curve([0], [0], [0], [1.0])} for _ in runs], [], (board.axes[0], board.axes[1]))
    texts, axes = {}, {}
    for plot in (charts._loss, charts._tradeoff, charts._parallel):
        axes[plot] = Figure(layout="constrained").add_subplot()
        plot(axes[plot], board, drawing)
        (legend,) = axes[plot].get_figure().legends
        texts[plot] = [text.get_text() for text in legend.get_texts()]
    assert all(names == [*(f"{n + 1}  run-{n}" for n in range(8)), "4 other runs"] for names in texts.values())
    assert axes[charts._tradeoff].get_xlabel() == "memory (GiB)"
    assert axes[charts._loss].get_ylabel() == "loss on held-out text (nats per token)"
    assert [text.get_text() for text in axes[charts._tradeoff].texts] == [str(n) for n in range(1, 9)]
