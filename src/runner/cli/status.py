"""The verb ``status``: a table of runs and sweeps with their status."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from runner import streams, terminal
from runner.cli import status_screen
from runner.cli.args import RUN, Args, Option, Verb
from runner.cli.status_table import Group, Row, as_json, table
from runner.tracking import lookup, run_status
from runner.tracking.mirror import backlog
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import FINAL
from runner.tracking.sweepdir import SweepDir

VERB = Verb(
    "status [RUN|SWEEP|FOLDER …]",
    f"""Status of your runs, from their folders, their processes and Slurm. A run that died without updating its status
is closed in its folder and, after the table, in MLflow.

  python -m runner status                   the latest sweeps and runs, and all unfinished ones
  python -m runner status lora.r+quant      each job of that sweep
  python -m runner status outputs/2026-01-31 --all
  python -m runner status --watch           one screen with all runs until none is active: progress, loss, memory

{RUN}, or a Slurm job id;
SWEEP its name or its folder.""",
    Option("--all", "all runs, not only the latest"),
    Option("--watch", "repeat every few seconds; q or Ctrl-C stops watching, not the runs; lines where no terminal is"),
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
            backlog.upload_ended(_ended(groups))
    return 0


def _read(args: Args) -> list[Group]:
    """The current status of the named runs and sweeps, in their order; of all, latest first, if none is named."""
    folders: dict[Path, tuple[RunDir | SweepDir, bool]] = {}
    for word in args.words:
        for folder, is_named in lookup.resolve_or_scan(word, args.outputs_dir):
            folders.setdefault(folder.path, (folder, is_named))
    if not args.words:
        folders = {folder.path: (folder, False) for folder in lookup.scan(args.outputs_dir)}
    rundirs = [[folder] if isinstance(folder, RunDir) else lookup.runs_of(folder) for folder, _ in folders.values()]
    statuses = iter(run_status.of([rundir for several in rundirs for rundir in several]))
    groups = [
        Group(folder if isinstance(folder, SweepDir) else None, [next(statuses) for _ in several], is_named)
        for (folder, is_named), several in zip(folders.values(), rundirs, strict=True)
    ]
    return groups if args.words else sorted(groups, key=lambda group: group.updated, reverse=True)


def _print(groups: Sequence[Group], args: Args) -> None:
    is_json = args["--json"]
    print(json.dumps([as_json(group) for group in groups], indent=1) if is_json else _text(groups, args), flush=True)


def _text(groups: Sequence[Group], args: Args) -> str:
    shown = [
        group for number, group in enumerate(groups)
        if args.words or args["--all"] or number < LATEST or not group.is_finished
    ]  # fmt: skip
    rows: list[Row] = []
    labels = iter(terminal.distinct_names([run.label for group in shown if group.is_open for run in group.runs], LABEL))
    for group in shown:
        rows += [Row.of_sweep(group)] if group.sweep else []
        runs = group.runs if group.is_open else []
        rows += [Row.of_run(run, next(labels), indent=bool(group.sweep)) for run in runs]
    folder, elsewhere = terminal.nearest(args.outputs_dir.absolute()), "runs elsewhere: python -m runner status FOLDER"
    if not rows:
        return f"no runs below {folder} yet: start one with python -m runner; {elsewhere}"
    lines = table(rows)
    if len(shown) < len(groups):
        lines.append(f"and {len(groups) - len(shown)} older ones: python -m runner status --all")
    if not args.words:
        lines.append(f"these are the runs below {folder}; {elsewhere}")
    return "\n".join([*lines, *_hints(shown)])


def _hints(shown: Sequence[Group]) -> list[str]:
    """Commands to run next, if exactly one run or sweep was named."""
    if len(shown) != 1 or not shown[0].is_named or not shown[0].runs:
        return []
    group, hints = shown[0], []
    counts = Counter(run.status for run in group.runs)
    if group.sweep:
        folder = terminal.typed(terminal.nearest(group.sweep.path))
        if counts["pending"] + counts["killed"] + counts["preempted"] and not any(run.is_live for run in group.runs):
            hints.append(f"continue  {group.again} (completed runs are skipped)")
        if counts["failed"]:
            command = group.sweep.command()
            hints.append(f"retry     {command} retry=true" if command else "retry     the same command with retry=true")
    else:
        run, folder = group.runs[0], terminal.typed(terminal.nearest(group.runs[0].rundir.path))
        if run.status in ("pending", "killed", "preempted", "failed"):
            again = terminal.typed(terminal.nearest(run.rundir.path), "resume")
            hints.append(f"continue  python -m runner {again}{' retry=true' * counts['failed']}")
        if url := (run.manifest.get("mlflow") or {}).get("url"):
            hints.append(f"MLflow    {url}")
        hints.append(f"log       python -m runner logs {folder}")
    if any(run.is_live for run in group.runs):
        hints.append(f"cancel    python -m runner cancel {folder}")
    return ["", *hints]


def _watch(args: Args) -> None:
    """Show the status until no run is live, or the user stops watching."""
    has_screen = sys.stdout.isatty() and not args["--json"]
    try:
        has_ended = _watch_screen(args) if has_screen else _watch_lines(args)
    except KeyboardInterrupt:
        has_ended = False
    if has_screen:
        groups = _read(args)
        _print(groups, args)
        backlog.upload_ended(_ended(groups))
    if not has_ended:
        print("stopped watching; the runs continue", file=sys.stderr)


def _watch_screen(args: Args) -> bool:
    """Draw the screen until no run is live; False if the user stops watching."""
    groups = _read(args)
    if not _has_live(groups):
        return True
    with status_screen.Screen() as screen:
        while _has_live(groups):
            screen.draw(status_screen.lines(groups, *shutil.get_terminal_size()))
            if not screen.waits(_pause_s(groups)):
                return False
            groups = _read(args)
    return True


def _watch_lines(args: Args) -> bool:
    """Print the status each time that it changes until no run is live."""
    before = ""
    uploaded: set[Path] = set()
    while True:
        groups = _read(args)
        text = json.dumps([as_json(group) for group in groups]) if args["--json"] else _text(groups, args)
        if text != before:
            print(text, end="\n" if args["--json"] else "\n\n", flush=True)
        before = text
        backlog.upload_ended([rundir for rundir in _ended(groups) if rundir.path not in uploaded])
        uploaded |= {rundir.path for rundir in _ended(groups)}
        if not _has_live(groups):
            return True
        time.sleep(_pause_s(groups))


def _has_live(groups: Iterable[Group]) -> bool:
    return any(run.is_live for group in groups for run in group.runs)


def _pause_s(groups: Iterable[Group]) -> float:
    return SLURM_POLL_S if any(run.job for group in groups for run in group.runs) else POLL_S


def _ended(groups: Iterable[Group]) -> list[RunDir]:
    return [run.rundir for group in groups for run in group.runs if run.status in (*FINAL, "preempted")]
