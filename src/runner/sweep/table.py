"""The table that a sweep prints when it ends."""

from __future__ import annotations

from runner import terminal
from runner.tracking import metrics_log, run_status
from runner.tracking.rundir import DONE, RunDir


def sweep(runs: list[tuple[str, RunDir]], *, is_detached: bool) -> None:
    """All runs of a sweep as they stand, in one table, then what to do next; ``is_detached``: they go on after this."""
    rows, reasons = [], []
    found = run_status.of([rundir for _, rundir in runs])
    for (label, rundir), run in zip(runs, found, strict=True):
        loss = run.state.summary.get(metrics_log.LOSS)
        if run.status == "pruned":
            loss = metrics_log.last_values(metrics_log.read(rundir)).get(metrics_log.LOSS)
        shown = f"{loss:.4f}" if loss is not None else "–"
        rows.append([label or rundir.path.name, run.status, shown, terminal.nearest(rundir.path)])
        if run.reason and run.status != "pending" and not run.is_live:  # what waits says so in the table
            reasons.append(f"{run.status}  {label or rundir.path.name}: {run.reason}")
    terminal.table("sweep", ["run", "status", "held-out loss", "folder"], rows)
    for reason in reasons:  # beside the table: a reason broken into a column can be neither read nor searched
        terminal.say(reason)
    home = terminal.nearest(runs[0][1].path.parent)
    states = [run.status for run in found]
    if is_detached or any(run.is_live for run in found):
        terminal.say(f"next     python -m runner status {home}")
    elif set(states) <= set(DONE):
        terminal.say(f"next     python -m runner compare {home}")
    else:
        again = "the same command with retry=true" if "failed" in states else "the same command again"
        terminal.say(f"next     {again}: what is completed is skipped; python -m runner logs RUN says why one failed")
