"""The rows of ``status``: runs and sweeps as a table, or as JSON."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runner import streams, terminal
from runner.terminal import duration
from runner.tracking import metrics_log, run_status
from runner.tracking.run_status import RunStatus
from runner.tracking.state_file import FINAL
from runner.tracking.sweepdir import SweepDir

COLOURS = {
    "completed": "32", "pruned": "32",
    "running": "36", "starting": "36", "stopping": "36", "queued": "33", "requeued": "33",
    "pending": "33", "preempted": "33", "failed": "31", "killed": "31", "damaged": "31", "missing": "31",
    "unknown": "35",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A single run, or the runs of a sweep."""

    sweep: SweepDir | None
    runs: list[RunStatus]
    is_named: bool

    @property
    def is_open(self) -> bool:
        """Whether each run has a row of its own: not for a sweep that was not named."""
        return self.sweep is None or self.is_named

    @property
    def updated(self) -> float:
        return max((run.state.updated for run in self.runs), default=0.0)

    @property
    def again(self) -> str:
        """What continues the sweep: its last command."""
        assert self.sweep
        command = self.sweep.command()
        return f"repeat the command: {command}" if command else "repeat the command of the sweep"

    @property
    def is_finished(self) -> bool:
        return all(run.status in (*FINAL, "missing", "damaged") for run in self.runs)


@dataclass(frozen=True)
class Row:
    cells: tuple[str, ...]
    status: str = ""
    reason: str = ""

    @classmethod
    def of_sweep(cls, group: Group) -> Row:
        assert group.sweep
        counts = Counter(run.status for run in group.runs)
        order = sorted(counts, key=list(COLOURS).index)
        text = ", ".join(f"{counts[status]} {status}" for status in order) or "no runs"
        shared = order[0] if len(order) == 1 else ""
        orphans = sum(run.reason == run_status.NOBODY for run in group.runs)
        which = "these runs" if orphans == len(group.runs) else f"{orphans} of these runs"
        reason = f"no process will start {which}: {group.again}" if orphans and not group.is_open else ""
        cells = (f"{group.sweep.path.name}/", text, "", "", "", "", terminal.nearest(group.sweep.path))
        return cls(cells, shared, reason)

    @classmethod
    def of_run(cls, run: RunStatus, label: str, *, indent: bool) -> Row:
        state = run.state
        step = f"{state.step}/{state.total_steps}" if state.total_steps else ""
        eta = eta_s(run)
        cells = ("  " * indent + label, run.status, step, _loss_text(run), duration(eta) if eta is not None else "",
                 where(run), terminal.nearest(run.rundir.path))  # fmt: skip
        return cls(cells, run.status, run.reason)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines with aligned columns, without empty ones. The folder is never cut; a reason is a line below its run."""
    titles = ("run", "status", "step", "loss", "eta", "where", "folder")
    all_cells = [titles, *(row.cells for row in rows)]
    widths = [max(len(cells[column]) for cells in all_cells) for column in range(len(titles))]
    kept = [column for column in range(len(titles)) if any(row.cells[column] for row in rows)]

    def line(cells: Sequence[str], status: str = "") -> str:
        padded = {column: cells[column].ljust(widths[column]) for column in kept}
        if status:
            padded[1] = coloured(padded[1], status)
        return "  ".join(padded.values()).rstrip()

    lines = [line(titles)]
    for row in rows:
        lines.append(line(row.cells, row.status))
        lines += [f"{'':6}{row.reason}"] if row.reason else []
    return lines


def coloured(text: str, status: str) -> str:
    """The text in the colour of a status, where the terminal shows colours."""
    has_colours = status in COLOURS and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return streams.styled(text, COLOURS[status]) if has_colours else text


def eta_s(run: RunStatus) -> float | None:
    """Estimated seconds until the run ends, at its average speed so far; None if it is not running or has no steps."""
    return run.state.remaining_s() if run.status == "running" else None


def where(run: RunStatus) -> str:
    """Where a live run is: pid@host, or its Slurm job id and nodes; empty if it is not live."""
    if not run.is_live:
        return ""
    if run.job is not None:
        node = run.job.nodes if run.status in ("running", "starting", "stopping") else ""
        return f"job {run.manifest['slurm']['job_id']}" + (f" on {node}" if node else "")
    return f"{run.state.pid}@{run.state.host}" if run.status == "running" and run.state.pid else ""


def loss_of(run: RunStatus) -> tuple[str, float] | None:
    """("eval" or "train", the latest loss); for a completed run the final eval loss; None if there is no loss."""
    final = run.state.summary.get("eval/loss")
    if run.status == "completed" and isinstance(final, int | float):
        return "eval", float(final)
    name, loss = metrics_log.last_of(run.rundir, "eval/loss", "train/loss") or ("", 0.0)
    return (name.partition("/")[0], loss) if name else None


def _loss_text(run: RunStatus) -> str:
    loss = loss_of(run)
    return f"{loss[1]:.4f} {loss[0]}" if loss else ""


def as_json(group: Group) -> dict[str, Any]:
    runs = [_run_as_json(run) for run in group.runs]
    if group.sweep is None:
        return runs[0]
    counts = dict(Counter(run.status for run in group.runs))
    return {"kind": "sweep", "name": group.sweep.path.name, "folder": str(group.sweep.path), "counts": counts,
            "runs": runs}  # fmt: skip


def _run_as_json(run: RunStatus) -> dict[str, Any]:
    kind, loss = loss_of(run) or (None, None)
    state = run.state
    return {
        "kind": "run", "label": run.label, "folder": str(run.rundir.path), "status": run.status, "reason": run.reason,
        "step": state.step, "total_steps": state.total_steps, "loss": loss, "loss_kind": kind, "eta_s": eta_s(run),
        "host": state.host, "pid": state.pid, "job_id": (run.manifest.get("slurm") or {}).get("job_id"),
        "slurm_state": run.job.state if run.job else None, "updated": state.updated,
        "mlflow_run_id": (run.manifest.get("mlflow") or {}).get("run_id"),
    }  # fmt: skip
