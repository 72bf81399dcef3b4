"""The table that a sweep prints when it ends."""

from __future__ import annotations

from runner import terminal
from runner.tracking import metrics_log, run_status
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DONE
from runner.tracking.sweepdir import home_of


def sweep(runs: list[tuple[str, RunDir]], *, is_detached: bool) -> None:
    """Print the status of all runs of a sweep and the next command. ``is_detached``: runs continue without us."""
    rows, reasons = [], []
    statuses = run_status.of([rundir for _, rundir in runs])
    for (label, rundir), run in zip(runs, statuses, strict=True):
        loss = run.state.summary.get(metrics_log.LOSS)
        if run.status == "pruned":
            loss = metrics_log.last_values(metrics_log.read(rundir)).get(metrics_log.LOSS)
        loss_text = f"{loss:.4f}" if loss is not None else "–"
        rows.append([label or rundir.path.name, run.status, loss_text, terminal.nearest(rundir.path)])
        if run.reason and run.status != "pending" and not run.is_live:  # the table shows waiting runs
            reasons.append(f"{run.status}  {label or rundir.path.name}: {run.reason}")
    terminal.table("sweep", ["run", "status", "held-out loss", "folder"], rows)
    for reason in reasons:  # below the table: line breaks in a column would make reasons hard to read and to search
        terminal.print_line(reason)
    home = terminal.typed(terminal.nearest(home_of(runs[0][1])))
    states = {run.status for run in statuses}
    if is_detached or any(run.is_live for run in statuses):
        terminal.print_line(f"next     python -m runner status {home}")
    elif states <= set(DONE):
        terminal.print_line(f"next     python -m runner compare {home}")
    else:
        again = "the same command with retry=true" if "failed" in states else "the same command again"
        terminal.print_line(
            f"next     {again} (completed runs are skipped); python -m runner logs RUN shows why a run failed"
        )
