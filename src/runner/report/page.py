"""Render a comparison as one self-contained HTML page: table, loss curves, trade-offs, parameter importance."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.report import advice, columns, curves, ranking, results, samples
from runner.report.columns import CPU_MEMORY, GPU_MEMORY, SPEED, Goal
from runner.report.curves import Curves
from runner.report.leaderboard import Leaderboard
from runner.report.results import Result
from runner.report.samples import Samples

TEMPLATE = Path(__file__).with_name("page.html")
MOST_COLOURS = 8


@dataclass(frozen=True)
class Drawing:
    """Data of the charts besides the leaderboard itself."""

    curves: list[Curves]
    """In the order of the leaderboard's results."""
    importance: list[tuple[str, float]]
    """(parameter, share of the variance that it explains), the largest first."""
    scatter: tuple[Goal, Goal]
    """The x and the y axis."""
    samples: dict[int, Samples] = field(default_factory=dict)
    """Index of a run → its prompts and answers."""
    note: str = ""
    """What could not be read; empty if nothing is missing."""


def drawing(board: Leaderboard, uri: str = "", *, has_answers: bool = True) -> Drawing:
    """Collect curves and answers of the runs from their folders, or from the MLflow store at ``uri``."""
    importance = ranking.importance(board.results, board.params, board.goal)
    answers = samples.gather(board.results, uri) if has_answers else ({}, "")
    return Drawing(curves.gather(board.results, uri), importance, _scatter(board), *answers)


def render(board: Leaderboard, drawing: Drawing, title: str) -> str:
    """The HTML page. Names of runs are escaped: they cannot inject HTML or scripts."""
    data = json.dumps(_data(board, drawing, title), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # a "</script>" in the data must not end the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    heading, place, rest = TEMPLATE.read_text(encoding="utf-8").partition("__DATA__")
    return heading.replace("__TITLE__", html.escape(f"{title}: runner compare")) + data + rest if place else heading


def _data(board: Leaderboard, drawing: Drawing, title: str) -> dict[str, Any]:
    names = sorted({key for result in board.results for key in result.metrics})
    rows = board.rows()
    count = sum(1 for curves_of_run in drawing.curves if curves_of_run)
    return {
        "title": title,
        "subtitle": f"{len(board.results)} run{'s' * (len(board.results) > 1)}, compared {time.strftime('%F %T')}",
        "facts": _facts(board),
        "notes": [*board.notes, *([drawing.note] if drawing.note else [])],
        "next": [[each.kind, str(each)] for each in advice.of(board.results, board.params, board.goal, board.over)],
        "over": board.over or next((key for key in board.params if key.endswith(advice.REPEATED)), ""),
        "marks": board.legend(),
        "goal": board.goal.key,
        "params": board.params,
        "columns": [
            {"key": key, "title": head, "is_metric": key in board.metrics}
            for key, head in zip(board.keys(), board.titles(), strict=True)
        ],
        "all_metrics": [_metric(name, board) for name in names],
        "colour": _colour(board, drawing),
        "scatter": [axis.key for axis in drawing.scatter],
        "fronts": _fronts(board, names),
        "parallel": list(dict.fromkeys([*(axis.key for axis in board.axes), board.goal.key])),
        "importance": [[key, round(share, 4)] for key, share in drawing.importance],
        "runs": [
            {
                "run": result.run, "label": result.label, "status": result.status, "reason": result.reason,
                "sweep": result.sweep, "folder": result.folder, "best": result is board.best, "cells": row,
                "links": _links(result),
                "metrics": dict(result.metrics),
                "params": {key: result.params[key] for key in board.params if key in result.params},
            }
            for result, row in zip(board.results, rows, strict=True)
        ],
        "curves": {number: _points(each) for number, each in enumerate(drawing.curves) if each},
        "samples": drawing.samples,
        "left_out": f"Curves of {count} of {len(board.results)} runs." if count < len(board.results) else "",
        "groups": _groups(board),
    }  # fmt: skip


def _links(result: Result) -> list[tuple[str, str, str]]:
    """(name, address, hint) of the places of a run; no other kind of address, as the names of runs are anybody's."""
    places = [("folder", Path(result.folder).as_uri() if result.folder else ""), ("MLflow", result.mlflow_url)]
    return [
        (name, address, "while python -m runner ui is running" if address.startswith(results.UI) else address)
        for name, address in places if address.startswith(("file://", "http://", "https://"))
    ]  # fmt: skip


def _facts(board: Leaderboard) -> list[tuple[str, str]]:
    key = board.goal.key
    number = columns.text(key, columns.value(board.best, key))
    counts = ", ".join(f"{count} {status}" for status, count in board.statuses.items())
    return [("best", board.best.label), (columns.title(key, board.metrics), number), ("runs", counts)]


def _metric(name: str, board: Leaderboard) -> dict[str, Any]:
    title, larger = columns.title(name, board.metrics), _goal(name, board).is_larger_better
    return {"key": name, "title": title, "unit": columns.unit(name), "larger": larger}


def _goal(key: str, board: Leaderboard) -> Goal:
    """The goal for a key: as set by the user (``--sort``, ``--pareto``), else decided by the name of the key."""
    return next((goal for goal in (*board.axes, board.goal) if goal.key == key), columns.by_name(key))


def _fronts(board: Leaderboard, names: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Pareto fronts, key → key → indices of the runs, for each pair of metrics and numeric parameters."""
    numeric = [key for key in board.params if any(columns.number(result.params.get(key)) is not None
                                                 for result in board.results)]  # fmt: skip
    fronts: dict[str, dict[str, list[int]]] = {}
    for (one, other), runs in ranking.fronts(board.results, [_goal(key, board) for key in (*names, *numeric)]).items():
        fronts.setdefault(one, {})[other] = runs
    return fronts


def _colour(board: Leaderboard, drawing: Drawing) -> str:
    """The key that colours the runs initially: the most important parameter with at most MOST_COLOURS values."""
    sizes = {key: len({result.params.get(key) for result in board.results}) for key in board.params}
    ranked = [*(key for key, _ in drawing.importance), *board.params]
    return next((key for key in ranked if 1 < sizes[key] <= MOST_COLOURS), board.goal.key)


def _scatter(board: Leaderboard) -> tuple[Goal, Goal]:
    """The axes of the scatter plot: the first two of ``--pareto``, else memory (or speed) and the ranked metric."""
    if board.axes:
        return board.axes[0], board.axes[1]
    across = next((key for key in (GPU_MEMORY, CPU_MEMORY, SPEED) if key in board.metrics), board.metrics[0])
    return columns.by_name(across), board.goal


def _points(curves_of_run: Curves) -> dict[str, Sequence[Any]]:
    return {
        kind: [curve.steps, curve.tokens, curve.seconds, [float(f"{value:.6g}") for value in curve.values]]
        for kind, curve in curves_of_run.items()
    }


def _groups(board: Leaderboard) -> dict[str, Any] | None:
    if not board.has_means:
        return None
    best = [number for number, group in enumerate(board.groups) if group.is_best]
    lead = len([key for key in board.params if key != board.over])
    return {"heading": board.group_heading(), "titles": board.group_titles(), "rows": board.group_rows(), "best": best,
            "numbers": [lead, lead + 1 + len(board.metrics)]}  # fmt: skip
