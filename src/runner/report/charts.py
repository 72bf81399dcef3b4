"""Write the charts of the HTML page as PNG files with matplotlib, for a paper or a slide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.report import columns, ranking
from runner.report.columns import Goal
from runner.report.leaderboard import Leaderboard
from runner.report.page import Drawing
from runner.report.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 7.0, 4.2, 160
"""Inches, inches, dots per inch: 1120 by 672 pixels."""
WIDE = 50
"""An axis is logarithmic if its largest value is more than WIDE times its smallest (learning rates)."""
COLOURS, OTHERS = ("#2458c5", "#e0762b", "#2f9e6e", "#c2417c", "#8a63d2", "#b59b12", "#2aa5b8", "#8c6d5a"), "#9aa0ac"
"""Colours of the runs that a legend names, the best first; all others are grey."""
BEST = COLOURS[0]
LABEL = 60
"""Number of characters of a name in a legend."""

Scale = tuple[list[float | None], list[tuple[float, str]]]
"""(position of each value on an axis from 0 to 1, ticks as (position, label))"""


def draw(board: Leaderboard, drawing: Drawing, folder: Path) -> list[Path]:
    """Write loss.png, tradeoff.png, importance.png and parallel.png, except those without data; returns their paths.

    Raises:
        OSError: the folder cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    charts: list[tuple[str, bool, Callable[[Axes, Leaderboard, Drawing], None]]] = [
        ("loss", any("eval" in curves for curves in drawing.curves), _loss),
        ("tradeoff", True, _tradeoff),
        ("importance", bool(drawing.importance), _importance),
        ("parallel", bool(board.params), _parallel),
    ]
    return [_write(folder / f"{name}.png", plot, board, drawing) for name, has_data, plot in charts if has_data]


def _write(
    path: Path, plot: Callable[[Axes, Leaderboard, Drawing], None], board: Leaderboard, drawing: Drawing
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")  # not pyplot, which needs a display
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    plot(axes, board, drawing)
    figure.savefig(path)
    return path


def _loss(axes: Axes, board: Leaderboard, drawing: Drawing) -> None:
    pairs = zip(board.results, drawing.curves, strict=True)
    evals = [(result, curves["eval"]) for result, curves in pairs if "eval" in curves]
    named = _named([result for result, _ in evals], board)
    for result, curve in reversed(evals):  # the best runs last: on top
        if id(result) in named:
            width = 2.2 if result is board.best else 1.4
            axes.plot(curve.steps, curve.values, color=named[id(result)][0], linewidth=width, marker=".")
        else:
            axes.plot(curve.steps, curve.values, color=OTHERS, alpha=max(0.15, min(0.8, 12 / len(evals))), linewidth=1)
    axes.set(xlabel="steps", ylabel=f"loss on held-out text{' (nats per token)' if _is_per_token(board) else ''}")
    _legend(axes, named, len(evals))
    axes.grid(alpha=0.25)


def _tradeoff(axes: Axes, board: Leaderboard, drawing: Drawing) -> None:
    across, up = drawing.scatter
    front = ranking.front(board.results, drawing.scatter)
    completed = [result for result in board.results if result.is_completed]
    named = _named(list({id(result): result for result in [*front, *completed]}.values()), board)
    axes.scatter(_numbers(completed, across), _numbers(completed, up), color=OTHERS, s=22)
    for result in completed:
        if id(result) in named:
            colour, name = named[id(result)]
            point = _numbers([result], across)[0], _numbers([result], up)[0]
            axes.annotate(name.partition(" ")[0], point, (4, 4), textcoords="offset points", fontsize=8, color=colour)
    xs, ys = _numbers(front, across), _numbers(front, up)
    axes.scatter(xs, ys, color=BEST, s=42, zorder=3)
    axes.step(xs, ys, where="post", color=BEST, linestyle="--", linewidth=1, label="Pareto front")
    axes.legend(frameon=False)
    axes.set(xlabel=_title(across.key, board), ylabel=_title(up.key, board))
    axes.grid(alpha=0.25)
    _legend(axes, named, len(completed))


def _importance(axes: Axes, board: Leaderboard, drawing: Drawing) -> None:
    shown = drawing.importance[:12][::-1]
    axes.barh([_plain(key) for key, _ in shown], [share for _, share in shown], color=BEST, height=0.6)
    axes.set(xlim=(0, 1), xlabel=f"share of the variance of the ranks in {board.goal.key} (ε²)")


def _parallel(axes: Axes, board: Leaderboard, drawing: Drawing) -> None:
    """Parallel coordinates: one axis for each parameter, and the ranked metric as the last; the best run on top."""
    keys = [*board.params, board.goal.key]
    scales = [_positions(key, [columns.value(result, key) for result in board.results]) for key in board.params]
    scales.append(_scaled([columns.number(columns.value(result, board.goal.key)) for result in board.results]))
    completed = [index for index, result in enumerate(board.results) if result.is_completed]
    named = _named([board.results[index] for index in completed], board)
    for index in reversed(completed):
        result = board.results[index]
        alpha = 1.0 if id(result) in named else max(0.12, min(0.7, 15 / len(completed)))
        heights: list[Any] = [positions[index] for positions, _ in scales]
        colour, width = named.get(id(result), (OTHERS, ""))[0], 2.2 if result is board.best else 1.2
        axes.plot(range(len(keys)), heights, color=colour, alpha=alpha, linewidth=width)
    for x, (_, ticks) in enumerate(scales):
        axes.axvline(x, color="#55585f", linewidth=0.8)
        for height, text in ticks:
            axes.text(x + 0.03, height, _plain(text), fontsize=7, va="center")
    axes.set_xticks(
        range(len(keys)), [*(_plain(key.rpartition(".")[2]) for key in keys[:-1]), _title(keys[-1], board)], fontsize=8
    )
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    _legend(axes, named, len(completed))


def _named(results: Sequence[Result], board: Leaderboard) -> dict[int, tuple[str, str]]:
    """id of a run → (colour, "3  name") for the first runs, as many as there are colours; the best is always named.

    The number is the place in the table.
    """
    rest = [result for result in results if result is not board.best]
    chosen = [*(result for result in results if result is board.best), *rest][: len(COLOURS)]
    place = {id(result): number for number, result in enumerate(board.results, 1)}
    chosen.sort(key=lambda result: place[id(result)])
    colours = iter(COLOURS[1:])
    labels = terminal.distinct_names([result.label for result in chosen], LABEL)
    return {
        id(result): (BEST if result is board.best else next(colours), f"{place[id(result)]}  {label}")
        for result, label in zip(chosen, labels, strict=True)
    }


def _legend(axes: Axes, named: dict[int, tuple[str, str]], count: int) -> None:
    """The names of the runs, below the chart; ``count``: number of runs in the chart."""
    from matplotlib.lines import Line2D

    entries = [*named.values(), *([(OTHERS, f"{count - len(named)} other runs")] if count > len(named) else [])]
    lines = [Line2D([], [], color=colour, marker="o", label=_plain(name)) for colour, name in entries]
    figure: Any = axes.get_figure()
    figure.legend(handles=lines, loc="outside lower left", ncols=1 + (len(lines) > 4), fontsize=7, frameon=False)


def _is_per_token(board: Leaderboard) -> bool:
    """Whether the loss is the cross entropy per token, which has a perplexity."""
    return all("eval/perplexity" in result.metrics for result in board.results if result.is_completed)


def _positions(key: str, values: Sequence[columns.Value]) -> Scale:
    """The scale of a parameter: numeric for many different numbers, else one equally spaced position for each value."""
    numbers = [columns.number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if known and len(set(known)) > ranking.LEVELS and len(known) == sum(value is not None for value in values):
        return _scaled(numbers, is_log=min(known) > 0 and max(known) / min(known) > WIDE)
    distinct = sorted({str(value) for value in values if value is not None}, key=lambda text: (_order(text), text))
    position = {text: (n / (len(distinct) - 1) if len(distinct) > 1 else 0.5) for n, text in enumerate(distinct)}
    ticks = [(height, columns.text(key, text)[:18]) for text, height in position.items()][:12]
    return [None if value is None else position[str(value)] for value in values], ticks


def _scaled(numbers: Sequence[float | None], *, is_log: bool = False) -> Scale:
    """The numeric scale of these numbers, with ticks at both ends and in the middle; 0.5 if all are equal."""
    forward, backward = (math.log, math.exp) if is_log else (float, float)
    known = [forward(number) for number in numbers if number is not None]
    low, high = min(known), max(known)
    if low == high:
        return [None if number is None else 0.5 for number in numbers], [(0.5, f"{backward(low):.4g}")]
    positions = [None if number is None else (forward(number) - low) / (high - low) for number in numbers]
    return positions, [(height, f"{backward(low + height * (high - low)):.4g}") for height in (0.0, 0.5, 1.0)]


def _order(text: str) -> float:
    number = columns.number(text)
    return math.inf if number is None else number


def _numbers(results: Sequence[Result], goal: Goal) -> list[float]:
    """The values of the runs; NaN, which matplotlib does not draw, for a run without the value."""
    numbers = [columns.number(columns.value(result, goal.key)) for result in results]
    return [math.nan if number is None else number for number in numbers]


def _title(key: str, board: Leaderboard) -> str:
    short = columns.title(key, board.metrics)
    unit = columns.unit(key)
    return _plain(short + (f" ({unit})" if unit and unit != short else ""))


def _plain(text: str) -> str:
    """Escape the dollar sign, which starts a formula in matplotlib."""
    return text.replace("$", r"\$")
