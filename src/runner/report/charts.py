"""The charts of the page as pictures, for a paper or a slide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.report import columns, ranking
from runner.report.columns import Goal
from runner.report.leaderboard import Leaderboard
from runner.report.page import Drawing
from runner.report.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 7.0, 4.2, 160
"""Inches, and dots an inch: 1120 by 672."""
WIDE = 50
"""A range whose end is that many times its beginning is drawn by its logarithm, as learning rates are."""
BEST, OTHERS = "#2458c5", "#9aa0ac"


def draw(made: Leaderboard, drawn: Drawing, folder: Path) -> list[Path]:
    """Write loss.png, tradeoff.png, importance.png and parallel.png, those that have something to show.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, bool, Callable[[Axes, Leaderboard, Drawing], None]]] = [
        ("loss", any("eval" in found for found in drawn.curves), _loss),
        ("tradeoff", True, _tradeoff),
        ("importance", bool(drawn.importance), _importance),
        ("parallel", bool(made.params), _parallel),
    ]
    return [_write(folder / f"{name}.png", plot, made, drawn) for name, has, plot in wanted if has]


def _write(path: Path, plot: Callable[[Axes, Leaderboard, Drawing], None], made: Leaderboard, drawn: Drawing) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")  # no pyplot: it looks for a display
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    plot(axes, made, drawn)
    figure.savefig(path)
    return path


def _loss(axes: Axes, made: Leaderboard, drawn: Drawing) -> None:
    count = sum("eval" in found for found in drawn.curves)
    for result, found in zip(made.results, drawn.curves, strict=True):
        if "eval" in found and result is not made.best:
            strength = max(0.15, min(0.8, 12 / count))
            axes.plot(found["eval"].steps, found["eval"].values, color=OTHERS, alpha=strength, linewidth=1)
    for result, found in zip(made.results, drawn.curves, strict=True):
        if "eval" in found and result is made.best:
            label = _plain(f"best: {result.label}")
            axes.plot(found["eval"].steps, found["eval"].values, color=BEST, linewidth=2.2, label=label, marker=".")
            axes.legend(frameon=False)
    axes.set(xlabel="steps", ylabel="loss on held-out text")
    axes.grid(alpha=0.25)


def _tradeoff(axes: Axes, made: Leaderboard, drawn: Drawing) -> None:
    across, up = drawn.scatter
    front = ranking.front(made.results, drawn.scatter)
    completed = [result for result in made.results if result.is_completed]
    axes.scatter(_numbers(completed, across), _numbers(completed, up), color=OTHERS, s=22)
    xs, ys = _numbers(front, across), _numbers(front, up)
    axes.scatter(xs, ys, color=BEST, s=42, zorder=3)
    axes.step(xs, ys, where="post", color=BEST, linestyle="--", linewidth=1, label="Pareto front")
    axes.legend(frameon=False)
    axes.set(xlabel=_title(across.key, made), ylabel=_title(up.key, made))
    axes.grid(alpha=0.25)


def _importance(axes: Axes, made: Leaderboard, drawn: Drawing) -> None:
    shown = drawn.importance[:12][::-1]
    axes.barh([_plain(key) for key, _ in shown], [share for _, share in shown], color=BEST, height=0.6)
    axes.set(xlim=(0, 1), xlabel=f"share of the variance of the ranks in {made.goal.key} (ε²)")


def _parallel(axes: Axes, made: Leaderboard, drawn: Drawing) -> None:
    """Each parameter is an axis, the last one is what is ranked by; the best run is on top."""
    keys = [*made.params, made.goal.key]
    places = [_places(key, [columns.value(result, key) for result in made.results]) for key in made.params]
    places.append(_along([columns.number(columns.value(result, made.goal.key)) for result in made.results]))
    completed = [number for number, result in enumerate(made.results) if result.is_completed]
    for number in sorted(completed, key=lambda number: made.results[number] is made.best):
        is_best = made.results[number] is made.best
        strength = 1.0 if is_best else max(0.12, min(0.7, 15 / len(completed)))
        heights: list[Any] = [column[0][number] for column in places]
        colour, width = (BEST, 2.2) if is_best else (OTHERS, 1.0)
        axes.plot(range(len(keys)), heights, color=colour, alpha=strength, linewidth=width)
    for place, (_, ticks) in enumerate(places):
        axes.axvline(place, color="#55585f", linewidth=0.8)
        for height, text in ticks:
            axes.text(place + 0.03, height, _plain(text), fontsize=7, va="center")
    axes.set_xticks(range(len(keys)), [_plain(key.rpartition(".")[2]) for key in keys], fontsize=8)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)


def _places(key: str, values: Sequence[columns.Value]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Where each value lies on an axis from 0 to 1, and some of the values to write beside it."""
    numbers = [columns.number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if known and len(set(known)) > ranking.LEVELS and len(known) == sum(value is not None for value in values):
        return _along(numbers, by_logarithm=min(known) > 0 and max(known) / min(known) > WIDE)
    distinct = sorted({str(value) for value in values if value is not None}, key=lambda text: (_order(text), text))
    place = {text: (number / (len(distinct) - 1) if len(distinct) > 1 else 0.5) for number, text in enumerate(distinct)}
    ticks = [(height, columns.text(key, text)[:18]) for text, height in place.items()][:12]
    return [None if value is None else place[str(value)] for value in values], ticks


def _along(
    numbers: Sequence[float | None], *, by_logarithm: bool = False
) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Numbers on an axis from 0 to 1, and what to write at its ends and in its middle; equal ones lie there."""
    bent, straight = (math.log, math.exp) if by_logarithm else (float, float)
    known = [bent(number) for number in numbers if number is not None]
    low, high = min(known), max(known)
    if low == high:
        return [None if number is None else 0.5 for number in numbers], [(0.5, f"{straight(low):.4g}")]
    at = [None if number is None else (bent(number) - low) / (high - low) for number in numbers]
    return at, [(height, f"{straight(low + height * (high - low)):.4g}") for height in (0.0, 0.5, 1.0)]


def _order(text: str) -> float:
    found = columns.number(text)
    return float("inf") if found is None else found


def _numbers(results: Sequence[Result], goal: Goal) -> list[float]:
    """What the runs have there; NaN, which is not drawn, where they have none."""
    found = [columns.number(columns.value(result, goal.key)) for result in results]
    return [math.nan if number is None else number for number in found]


def _title(key: str, made: Leaderboard) -> str:
    short = columns.title(key, made.metrics)
    return _plain(key if short == key else f"{short} ({key})")


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
