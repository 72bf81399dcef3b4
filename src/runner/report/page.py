"""The comparison as one page of HTML that needs nothing else: table, curves, trade-offs, importance, everything."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.report import columns, curves, ranking
from runner.report.columns import CPU_MEMORY, GPU_MEMORY, SPEED, Goal
from runner.report.curves import Curves
from runner.report.leaderboard import Leaderboard

TEMPLATE = Path(__file__).with_name("page.html")
MOST_COLOURS = 8


@dataclass(frozen=True)
class Drawing:
    """What the charts show besides the board itself."""

    curves: list[Curves]
    """In the order of the board's results."""
    importance: list[tuple[str, float]]
    scatter: tuple[Goal, Goal]
    """Across and up."""


def drawing(made: Leaderboard, uri: str = "") -> Drawing:
    """Read what the charts need: from folders, or from the MLflow store at ``uri``."""
    importance = ranking.importance(made.results, made.params, made.goal)
    return Drawing(curves.gather(made.results, uri), importance, _scatter(made))


def render(made: Leaderboard, drawn: Drawing, title: str) -> str:
    """The page; whatever a run is called, it is text there and nothing else."""
    data = json.dumps(_data(made, drawn, title), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # nothing in it may end the element that it stands in
        data = data.replace(character, f"\\u{ord(character):04x}")
    heading, place, rest = TEMPLATE.read_text(encoding="utf-8").partition("__DATA__")
    return heading.replace("__TITLE__", html.escape(f"{title}: runner compare")) + data + rest if place else heading


def _data(made: Leaderboard, drawn: Drawing, title: str) -> dict[str, Any]:
    names = sorted({key for result in made.results for key in result.metrics})
    rows = made.rows()
    count = sum(1 for found in drawn.curves if found)
    return {
        "title": title,
        "made": f"{len(made.results)} run{'s' * (len(made.results) > 1)}, compared {time.strftime('%F %T')}",
        "facts": _facts(made),
        "notes": made.notes,
        "goal": made.goal.key,
        "params": made.params,
        "columns": [
            {"key": key, "title": head, "is_metric": key in made.metrics}
            for key, head in zip(made.keys(), made.titles(), strict=True)
        ],
        "all_metrics": [_metric(name, made) for name in names],
        "colour": _colour(made, drawn),
        "scatter": [axis.key for axis in drawn.scatter],
        "fronts": _fronts(made, names),
        "parallel": list(dict.fromkeys([*(axis.key for axis in made.axes), made.goal.key])),
        "importance": [[key, round(share, 4)] for key, share in drawn.importance],
        "runs": [
            {
                "run": result.run, "label": result.label, "status": result.status, "reason": result.reason,
                "sweep": result.sweep, "folder": result.folder, "best": result is made.best, "cells": row,
                "metrics": dict(result.metrics),
                "params": {key: result.params[key] for key in made.params if key in result.params},
            }
            for result, row in zip(made.results, rows, strict=True)
        ],
        "curves": {number: _points(found) for number, found in enumerate(drawn.curves) if found},
        "left_out": f"The curves of {count} of {len(made.results)} runs." if count < len(made.results) else "",
        "groups": _groups(made),
    }  # fmt: skip


def _facts(made: Leaderboard) -> list[tuple[str, str]]:
    key = made.goal.key
    number = columns.text(key, columns.value(made.best, key))
    counts = ", ".join(f"{count} {status}" for status, count in made.statuses.items())
    return [("best", made.best.label), (columns.title(key, made.metrics), number), ("runs", counts)]


def _metric(name: str, made: Leaderboard) -> dict[str, Any]:
    return {"key": name, "title": columns.title(name, made.metrics), "larger": _goal(name, made).is_larger_better}


def _goal(key: str, made: Leaderboard) -> Goal:
    """Which way it gets better: as was asked for, else as its name says."""
    return next((goal for goal in (*made.axes, made.goal) if goal.key == key), columns.by_name(key))


def _fronts(made: Leaderboard, names: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Key → key → the runs on the front of these two: of every metric, and of every parameter that is a number."""
    numbers = [key for key in made.params if any(columns.number(result.params.get(key)) is not None
                                                 for result in made.results)]  # fmt: skip
    found: dict[str, dict[str, list[int]]] = {}
    for (one, other), runs in ranking.fronts(made.results, [_goal(key, made) for key in (*names, *numbers)]).items():
        found.setdefault(one, {})[other] = runs
    return found


def _colour(made: Leaderboard, drawn: Drawing) -> str:
    """What the runs are coloured by at first: the parameter that matters most among those with few values."""
    sizes = {key: len({result.params.get(key) for result in made.results}) for key in made.params}
    ranked = [*(key for key, _ in drawn.importance), *made.params]
    return next((key for key in ranked if 1 < sizes[key] <= MOST_COLOURS), made.goal.key)


def _scatter(made: Leaderboard) -> tuple[Goal, Goal]:
    """The two goals that were asked for, else memory, or speed, against what is ranked by."""
    if made.axes:
        return made.axes[0], made.axes[1]
    across = next((key for key in (GPU_MEMORY, CPU_MEMORY, SPEED) if key in made.metrics), made.metrics[0])
    return columns.by_name(across), made.goal


def _points(found: Curves) -> dict[str, Sequence[Any]]:
    return {
        kind: [curve.steps, curve.tokens, curve.seconds, [float(f"{value:.6g}") for value in curve.values]]
        for kind, curve in found.items()
    }


def _groups(made: Leaderboard) -> dict[str, Any] | None:
    if not made.has_means:
        return None
    best = [number for number, group in enumerate(made.groups) if group.is_best]
    lead = len([key for key in made.params if key != made.over])
    return {"heading": made.group_heading(), "titles": made.group_titles(), "rows": made.group_rows(), "best": best,
            "numbers": [lead, lead + 1 + len(made.metrics)]}  # fmt: skip
