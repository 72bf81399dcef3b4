"""The comparison as one page of HTML that needs nothing else: table, curves, trade-offs, importance, everything."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import columns, curves, ranking
from runner.columns import CPU_MEMORY, GPU_MEMORY, SPEED, Goal
from runner.curves import Curves
from runner.leaderboard import Leaderboard

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
    on_front = {id(result) for result in made.front}
    count = sum(1 for found in drawn.curves if found)
    return {
        "title": title,
        "made": f"{len(made.results)} run{'s' * (len(made.results) > 1)}, compared {time.strftime('%F %T')}",
        "facts": _facts(made),
        "notes": made.notes,
        "goal": made.goal.key,
        "params": made.params,
        "metrics": made.metrics,
        "all_metrics": [_metric(name, made) for name in names],
        "colour": _colour(made, drawn),
        "scatter": [axis.key for axis in drawn.scatter],
        "parallel": list(dict.fromkeys([*(axis.key for axis in made.axes), made.goal.key])),
        "importance": [[key, round(share, 4)] for key, share in drawn.importance],
        "runs": [
            {
                "run": result.run, "label": result.label, "status": result.status, "reason": result.reason,
                "sweep": result.sweep, "folder": result.folder, "best": result is made.best,
                "front": id(result) in on_front, "metrics": dict(result.metrics),
                "params": {key: result.params[key] for key in made.params if key in result.params},
            }
            for result in made.results
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
    larger = next((axis for axis in (made.goal, *made.axes) if axis.key == name), None)
    upwards = larger.is_larger_better if larger else name.endswith(columns.LARGER_IS_BETTER)
    return {"key": name, "title": columns.title(name, made.metrics), "larger": upwards}


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
    return Goal(across, across.endswith(columns.LARGER_IS_BETTER)), made.goal


def _points(found: Curves) -> dict[str, Sequence[Any]]:
    return {
        kind: [curve.steps, curve.tokens, curve.seconds, [float(f"{value:.6g}") for value in curve.values]]
        for kind, curve in found.items()
    }


def _groups(made: Leaderboard) -> dict[str, Any] | None:
    if not made.groups:
        return None
    lead = len([key for key in made.params if key != made.over])
    return {"over": made.over, "titles": made.group_titles(), "rows": made.group_rows(), "lead": lead}
