"""The verb ``status``: a table of runs and sweeps with their status."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import streams, terminal
from runner.cli.args import RUN, Args, Option, Verb
from runner.terminal import duration
from runner.tracking import lookup, run_status
from runner.tracking.mirror import behind
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import FINAL, RunDir
from runner.tracking.sweepdir import SweepDir

VERB = Verb(
    "status [RUN|SWEEP|FOLDER …]",
    f"""Status of your runs, from their folders, their processes and Slurm. A run that died without updating its status
is closed in its folder and, after the table, in MLflow.

  python -m runner status                   the latest sweeps and runs, and all unfinished ones
  python -m runner status lora.r+quant      each job of that sweep
  python -m runner status outputs/2026-01-31 --all
  python -m runner status --watch           repeat until no run is active

{RUN}, or a Slurm job id;
SWEEP its name or its folder.""",
    Option("--all", "all runs, not only the latest"),
    Option("--watch", "repeat every few seconds; Ctrl-C stops watching, not the runs"),
    Option("--json", "for programs: a list of runs and sweeps; a sweep has a list of its runs"),
    notes="""Status
  pending   no process works on it          queued, requeued   waits in the local queue or in Slurm
  starting  a worker is loading             stopping           stop requested; it is saving its state
  running
  completed                                 failed, killed, preempted   with the reason
  pruned    paused by a search, which continues it if it becomes one of the best
  unknown   only visible on another host    missing, damaged   its folder or files are gone or unreadable
The exit code is always 0.""",
)

LATEST, LABEL = 15, 48
POLL_S, SLURM_POLL_S = 2.0, 10.0
"""Seconds between two updates of --watch. Longer for Slurm, whose daemons serve all users."""
TAIL_BYTES = 65536
COLOURS = {
    "completed": "32", "pruned": "32",
    "running": "36", "starting": "36", "stopping": "36", "queued": "33", "requeued": "33",
    "pending": "33", "preempted": "33", "failed": "31", "killed": "31", "damaged": "31", "missing": "31",
    "unknown": "35",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: a word that names no run, sweep or folder of runs, or an unknown option.
    """
    args = VERB.read(argv)
    with streams.piped():
        if args["--watch"]:
            _watch(args)
        else:
            groups = _read(args)
            _print(groups, args)
            behind.tell_of(_ended(groups))
    return 0


@dataclass(frozen=True)
class _Group:
    """A single run, or the runs of a sweep."""

    sweep: SweepDir | None
    runs: list[RunStatus]
    is_named: bool

    @property
    def updated(self) -> float:
        return max((run.state.updated for run in self.runs), default=0.0)

    @property
    def is_finished(self) -> bool:
        return all(run.status in (*FINAL, "missing", "damaged") for run in self.runs)


def _read(args: Args) -> list[_Group]:
    """The current status of the named runs and sweeps, in their order; of all, latest first, if none is named."""
    folders: dict[Path, tuple[RunDir | SweepDir, bool]] = {}
    for word in args.words:
        for folder, is_named in lookup.meant(word, args.outputs_dir):
            folders.setdefault(folder.path, (folder, is_named))
    if not args.words:
        folders = {folder.path: (folder, False) for folder in lookup.scan(args.outputs_dir)}
    rundirs = [[folder] if isinstance(folder, RunDir) else lookup.runs_of(folder) for folder, _ in folders.values()]
    statuses = iter(run_status.of([rundir for several in rundirs for rundir in several]))
    groups = [
        _Group(folder if isinstance(folder, SweepDir) else None, [next(statuses) for _ in several], is_named)
        for (folder, is_named), several in zip(folders.values(), rundirs, strict=True)
    ]
    return groups if args.words else sorted(groups, key=lambda group: group.updated, reverse=True)


def _print(groups: Sequence[_Group], args: Args) -> None:
    is_json = args["--json"]
    print(json.dumps([_as_json(group) for group in groups], indent=1) if is_json else _text(groups, args), flush=True)


def _text(groups: Sequence[_Group], args: Args) -> str:
    shown = [
        group for number, group in enumerate(groups)
        if args.words or args["--all"] or number < LATEST or not group.is_finished
    ]  # fmt: skip
    rows: list[_Row] = []
    labels = iter(terminal.told_apart([run.label for group in shown if _is_open(group) for run in group.runs], LABEL))
    for group in shown:
        rows += [_Row.of_sweep(group)] if group.sweep else []
        runs = group.runs if _is_open(group) else []
        rows += [_Row.of_run(run, next(labels), indent=bool(group.sweep)) for run in runs]
    folder, elsewhere = terminal.nearest(args.outputs_dir.absolute()), "runs elsewhere: python -m runner status FOLDER"
    if not rows:
        return f"no runs below {folder} yet: start one with python -m runner; {elsewhere}"
    lines = _table(rows)
    if len(shown) < len(groups):
        lines.append(f"and {len(groups) - len(shown)} older ones: python -m runner status --all")
    if not args.words:
        lines.append(f"these are the runs below {folder}; {elsewhere}")
    return "\n".join([*lines, *_hints(shown)])


def _is_open(group: _Group) -> bool:
    return group.sweep is None or group.is_named


def _hints(shown: Sequence[_Group]) -> list[str]:
    """Commands to run next, if exactly one run or sweep was named."""
    if len(shown) != 1 or not shown[0].is_named or not shown[0].runs:
        return []
    group, hints = shown[0], []
    counts = Counter(run.status for run in group.runs)
    if group.sweep:
        folder = terminal.nearest(group.sweep.path)
        if counts["pending"] + counts["killed"] + counts["preempted"] and not any(run.is_live for run in group.runs):
            hints.append("continue  run the command of the sweep again: completed runs are skipped")
        if counts["failed"]:
            hints.append("retry     the same command with retry=true")
    else:
        run, folder = group.runs[0], terminal.nearest(group.runs[0].rundir.path)
        if run.status in ("pending", "killed", "preempted", "failed"):
            hints.append(f"continue  python -m runner resume={folder}{' retry=true' * counts['failed']}")
        if url := (run.manifest.get("mlflow") or {}).get("url"):
            hints.append(f"MLflow    {url}")
        hints.append(f"log       python -m runner logs {folder}")
    if any(run.is_live for run in group.runs):
        hints.append(f"cancel    python -m runner cancel {folder}")
    return ["", *hints]


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    status: str = ""
    reason: str = ""

    @classmethod
    def of_sweep(cls, group: _Group) -> _Row:
        assert group.sweep
        counts = Counter(run.status for run in group.runs)
        order = sorted(counts, key=list(COLOURS).index)
        text = ", ".join(f"{counts[status]} {status}" for status in order) or "no runs"
        shared = order[0] if len(order) == 1 else ""
        is_orphaned = any(run.reason == run_status.NOBODY for run in group.runs) and not _is_open(group)
        cells = (f"{group.sweep.path.name}/", text, "", "", "", "", terminal.nearest(group.sweep.path))
        return cls(cells, shared, run_status.NOBODY if is_orphaned else "")

    @classmethod
    def of_run(cls, run: RunStatus, label: str, *, indent: bool) -> _Row:
        state = run.state
        step = f"{state.step}/{state.total_steps}" if state.total_steps else ""
        eta = eta_s(run)
        cells = ("  " * indent + label, run.status, step, _loss_text(run), duration(eta) if eta is not None else "",
                 where(run), terminal.nearest(run.rundir.path))  # fmt: skip
        return cls(cells, run.status, run.reason)


def _table(rows: Sequence[_Row]) -> list[str]:
    """Lines with aligned columns, without empty ones. The folder is never cut; a reason is a line below its run."""
    titles = ("run", "status", "step", "loss", "eta", "where", "folder")
    all_cells = [titles, *(row.cells for row in rows)]
    widths = [max(len(cells[column]) for cells in all_cells) for column in range(len(titles))]
    kept = [column for column in range(len(titles)) if any(row.cells[column] for row in rows)]

    def line(cells: Sequence[str], colour: str = "") -> str:
        padded = {column: cells[column].ljust(widths[column]) for column in kept}
        if colour and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            padded[1] = streams.styled(padded[1], colour)
        return "  ".join(padded.values()).rstrip()

    lines = [line(titles)]
    for row in rows:
        lines.append(line(row.cells, COLOURS.get(row.status, "")))
        lines += [f"{'':6}{row.reason}"] if row.reason else []
    return lines


def eta_s(run: RunStatus) -> float | None:
    """Estimated seconds until the run ends, at its average speed so far; None if it is not running or has no steps."""
    state = run.state
    if run.status != "running" or not state.step or not state.seconds:
        return None
    remaining = (state.total_steps - state.step) * state.seconds / state.step
    return max(0.0, remaining - max(0.0, time.time() - state.updated))


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
    if not run.rundir.metrics.exists():
        return None
    with run.rundir.metrics.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = handle.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
            for kind in ("eval", "train"):
                if f"{kind}/loss" in record:
                    return kind, float(record[f"{kind}/loss"])
        except (ValueError, TypeError):  # a truncated line
            continue
    return None


def _loss_text(run: RunStatus) -> str:
    loss = loss_of(run)
    return f"{loss[1]:.4f} {loss[0]}" if loss else ""


def _as_json(group: _Group) -> dict[str, Any]:
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


def _watch(args: Args) -> None:
    """Print the status repeatedly, until no run is live or Ctrl-C."""
    before = ""
    uploaded: set[Path] = set()
    try:
        while True:
            groups = _read(args)
            text = json.dumps([_as_json(group) for group in groups]) if args["--json"] else _text(groups, args)
            if sys.stdout.isatty():
                print(f"{streams.CLEAR}{text}", flush=True)
            elif text != before:
                print(text, end="\n" if args["--json"] else "\n\n", flush=True)
            before = text
            behind.tell_of([rundir for rundir in _ended(groups) if rundir.path not in uploaded])
            uploaded |= {rundir.path for rundir in _ended(groups)}
            runs = [run for group in groups for run in group.runs]
            if not any(run.is_live for run in runs):
                return
            time.sleep(SLURM_POLL_S if any(run.job for run in runs) else POLL_S)
    except KeyboardInterrupt:
        print("stopped watching; the runs continue", file=sys.stderr)


def _ended(groups: Iterable[_Group]) -> list[RunDir]:
    return [run.rundir for group in groups for run in group.runs if run.status in (*FINAL, "preempted")]
