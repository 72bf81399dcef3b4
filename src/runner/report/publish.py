"""Upload the result of a sweep to its parent run in MLflow: the best run, a table of all runs, the HTML page.

While the sweep runs, only the numbers of the best run so far.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.report import advice, columns, leaderboard, page, results
from runner.report.leaderboard import Leaderboard
from runner.report.results import Result
from runner.secrets import redact
from runner.tracking.mlflow import upload, views
from runner.tracking.mlflow.store import LONGEST_TAG, as_text
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

STAMP, NOTE = "runner.leaderboard", "mlflow.note.content"
COUNTED = "runner.best_of"
"""Tag: how many completed runs the best run so far was chosen from."""
SHARE = 20
"""A running sweep reads its results again when a twentieth more of them are there: few reads of many folders."""
TABLE, PAGE = "leaderboard.json", "compare.html"
OURS = "**Best of this sweep**"
"""The beginning of a note written by this module; a note without it was written by the user and is kept."""
SHOWN = 10


def send(
    client: MlflowClient,
    parent: Run,
    sweep: SweepDir,
    rundirs: Sequence[RunDir],
    states: Sequence[State],
    has_ended: bool = True,
) -> None:
    """Upload the leaderboard, unless the parent run already has it for the same runs in the same states.

    Unless ``has_ended``, only the best run so far, in one write.

    Raises:
        Exception: any error of the MLflow store; the next call repeats the upload.
    """
    if not has_ended:
        _send_best_so_far(client, parent, sweep, rundirs, states)
        return
    stamp = _stamp(states)
    if parent.data.tags.get(STAMP) == stamp or not any(state.status == "completed" for state in states):
        return
    with contextlib.suppress(ConfigError):  # no run has a loss, or the tasks differ: no leaderboard
        board = leaderboard.of(results.of_folders(rundirs, sweep.path.parent.parent))
        _send_best(client, parent, board, max(state.updated for state in states))
        drawing = page.drawing(board)
        client.log_text(parent.info.run_id, redact(page.render(board, drawing, f"sweep {sweep.path.name}")), PAGE)
        upload.send_table(client, parent, _rows(board), TABLE)
    completed = sum(state.status == "completed" for state in states)
    upload.send_tags(client, parent, {STAMP: stamp, COUNTED: completed})


def _stamp(states: Sequence[State]) -> str:
    """Identifies the set of runs and their last update."""
    return f"{len(states)} runs, {max(state.updated for state in states):.6f}" if states else ""


def _send_best_so_far(
    client: MlflowClient, parent: Run, sweep: SweepDir, rundirs: Sequence[RunDir], states: Sequence[State]
) -> None:
    from mlflow.entities import RunTag

    completed = [each for each in zip(rundirs, states, strict=True) if each[1].status == "completed"]
    counted = int(parent.data.tags.get(COUNTED) or 0)
    if len(completed) - counted < max(1, counted // SHARE):
        return
    points: list[Metric] = []
    tags: dict[str, Any] = {COUNTED: len(completed)}
    with contextlib.suppress(ConfigError):  # as above
        board = leaderboard.of(results.of_folders([rundir for rundir, _ in completed], sweep.path.parent.parent))
        points = _points(board, max(state.updated for _, state in completed))
        tags |= _best_tags(board)
    texts = {key: as_text(value, LONGEST_TAG) for key, value in tags.items()}
    client.log_batch(parent.info.run_id, metrics=points, tags=[RunTag(*each) for each in texts.items() if each[1]])


def _send_best(client: MlflowClient, parent: Run, board: Leaderboard, updated: float) -> None:
    """Log the best child run as metrics and tags; not as params, which cannot change when a later run is better."""
    client.log_batch(parent.info.run_id, metrics=_points(board, updated))
    note = parent.data.tags.get(NOTE, "")
    ours = not note or note.startswith(OURS)
    tags = {**_best_tags(board), NOTE: _note(board, str(parent.info.experiment_id)) if ours else note}
    upload.send_tags(client, parent, tags)


def _points(board: Leaderboard, updated: float) -> list[Metric]:
    from mlflow.entities import Metric

    best = board.best
    # MLflow shows the value with the highest step and time: the number of runs, and the time of their last update.
    # With a prefix: MLflow draws and sorts the parent run among the runs.
    metrics = {f"{views.BEST}/{key}": best.metrics[key] for key in board.metrics if key in best.metrics}
    metrics |= {key: best.metrics[key] for key in views.ON_PARENT if key in best.metrics}
    return [Metric(key, value, int(updated * 1000), len(board.results)) for key, value in metrics.items()]


def _best_tags(board: Leaderboard) -> dict[str, Any]:
    best = board.best
    return {
        "runner.best_run": best.label,
        "runner.best_run_id": best.mlflow_id,
        "runner.best_folder": best.folder,
        "runner.best_params": ", ".join(f"{key}={best.params[key]}" for key in board.params if key in best.params),
    }


def _note(board: Leaderboard, experiment: str) -> str:
    """The first SHOWN rows of the leaderboard as Markdown, each with a link to its run."""
    titles = ["run", *board.params, *(columns.title(key, board.metrics) for key in board.metrics)]
    rows = [
        [_link(result, experiment), *(cell.replace("|", "\\|") for cell in board.cells(result))]
        for result in board.results[:SHOWN]
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows])
    more = f"\n\nThe first {SHOWN} of {len(board.results)} runs; all are in {TABLE} and {PAGE}."
    found = advice.of(board.results, board.params, board.goal)
    after = "".join(f"\n- {each}" for each in found)
    text = f"{OURS}: {_link(board.best, experiment)}\n\n{table}{more if len(board.results) > SHOWN else ''}"
    return f"{text}\n\n**What to try next**\n{after}" if after else text


def _link(result: Result, experiment: str) -> str:
    label = result.label.replace("|", "\\|").replace("[", "(").replace("]", ")").replace("\n", " ")
    return f"[{label}](#/experiments/{experiment}/runs/{result.mlflow_id})" if result.mlflow_id else label


def _rows(board: Leaderboard) -> list[dict[str, Any]]:
    names, rows = board.table()
    return [json.loads(redact(json.dumps(dict(zip(names, row, strict=True))))) for row in rows]
