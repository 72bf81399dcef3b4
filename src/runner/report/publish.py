"""What the parent of a sweep shows in MLflow when its runs are through: the best run, a table of all, and the page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.report import columns, leaderboard, page, results
from runner.report.leaderboard import Leaderboard
from runner.report.results import Result
from runner.secrets import redact
from runner.tracking.mlflow import upload
from runner.tracking.rundir import RunDir, State
from runner.tracking.sweepdir import SweepDir

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STAMP, NOTE = "runner.leaderboard", "mlflow.note.content"
TABLE, PAGE = "leaderboard.json", "compare.html"
OURS = "**Best of this sweep**"
"""How a note of ours begins; what somebody else wrote there stays."""
SHOWN = 10


def send(
    client: MlflowClient, parent: Run, sweep: SweepDir, rundirs: Sequence[RunDir], states: Sequence[State]
) -> None:
    """Put it on the parent, unless what is there was made of the same runs in the same states.

    Raises:
        Exception: whatever a store that does not answer raises; the next call does what is left.
    """
    stamp = _stamp(states)
    if parent.data.tags.get(STAMP) == stamp or not any(state.status == "completed" for state in states):
        return
    with contextlib.suppress(ConfigError):  # no run has a loss, or their tasks differ: there is no board
        made = leaderboard.of(results.of_folders(rundirs, sweep.path.parent.parent))
        _send_best(client, parent, made, max(state.updated for state in states))
        drawn = page.drawing(made)
        client.log_text(parent.info.run_id, redact(page.render(made, drawn, f"sweep {sweep.path.name}")), PAGE)
        upload.send_table(client, parent, _rows(made), TABLE)
    upload.send_tags(client, parent, {STAMP: stamp})


def _stamp(states: Sequence[State]) -> str:
    """The same for the same runs, however often it is asked."""
    return f"{len(states)} runs, {max(state.updated for state in states):.6f}" if states else ""


def _send_best(client: MlflowClient, parent: Run, made: Leaderboard, updated: float) -> None:
    """The best child as metrics and tags: a param could not change when a later run is better."""
    from mlflow.entities import Metric

    best = made.best
    # The step is the number of runs, and the time that of their last news: what is said last counts in MLflow.
    metrics = {key: best.metrics[key] for key in made.metrics if key in best.metrics}
    points = [Metric(key, value, int(updated * 1000), len(made.results)) for key, value in metrics.items()]
    client.log_batch(parent.info.run_id, metrics=points)
    note = parent.data.tags.get(NOTE, "")
    tags: dict[str, Any] = {
        "runner.best_run": best.label,
        "runner.best_run_id": best.mlflow_id,
        "runner.best_folder": best.folder,
        "runner.best_params": ", ".join(f"{key}={best.params[key]}" for key in made.params if key in best.params),
        NOTE: _note(made, str(parent.info.experiment_id)) if not note or note.startswith(OURS) else note,
    }
    upload.send_tags(client, parent, tags)


def _note(made: Leaderboard, experiment: str) -> str:
    """The first of the board as Markdown, each with a link to its run."""
    titles = ["run", *made.params, *(columns.title(key, made.metrics) for key in made.metrics)]
    rows = [
        [_link(result, experiment), *(cell.replace("|", "\\|") for cell in made.cells(result))]
        for result in made.results[:SHOWN]
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows])
    more = f"\n\nThe first {SHOWN} of {len(made.results)}; all are in {TABLE} and {PAGE}."
    return f"{OURS}: {_link(made.best, experiment)}\n\n{table}{more if len(made.results) > SHOWN else ''}"


def _link(result: Result, experiment: str) -> str:
    label = result.label.replace("|", "\\|").replace("[", "(").replace("]", ")").replace("\n", " ")
    return f"[{label}](#/experiments/{experiment}/runs/{result.mlflow_id})" if result.mlflow_id else label


def _rows(made: Leaderboard) -> list[dict[str, Any]]:
    names, rows = made.table()
    return [json.loads(redact(json.dumps(dict(zip(names, row, strict=True))))) for row in rows]
