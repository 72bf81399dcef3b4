"""The verb ``compare``: a table of runs, best first, with the parameters that differ and the metrics."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import streams, terminal
from runner.cli.args import RUN, Args, Option, Verb
from runner.errors import ConfigError, Fault, TrackingError, UnknownNameError
from runner.files import user_path
from runner.report import advice, columns, leaderboard, results, store_lookup
from runner.report.advice import Advice
from runner.report.leaderboard import Leaderboard
from runner.report.results import Result
from runner.tracking import lookup
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

VERB = Verb(
    "compare [SWEEP|RUN|FOLDER|EXPERIMENT …]",
    f"""Which setting was better: a table of the parameters that differ between the runs, and of the metrics. Without
arguments: the latest sweep.

  python -m runner compare lora.r+quant                          the runs of that sweep, best first
  python -m runner compare --by seed                             mean and 95 % interval over the seeds of each setting
  python -m runner compare --where "lora.r>=8 and quant=4bit"    only these runs
  python -m runner compare --pareto memory,loss                  the best trade-offs between two metrics
  python -m runner compare --html report.html                    a page with curves and charts, in one file
  python -m runner compare uri=http://host:5000 my-experiment    read from MLflow instead of folders

{RUN};
SWEEP its name or its folder; EXPERIMENT an experiment of MLflow. Runs of different tasks are not compared.""",
    Option("--where CONDITION", "KEY=VALUE, !=, <, <=, >, >=, ~ (contains), with and, or, not and brackets"),
    Option("--by KEY", "average over runs that differ only in KEY; if nothing else differs, show only the mean"),
    Option(
        "--sort KEY",
        "best first: higher is better for accuracy, acc, f1, mfu, per_second, reward and the like, lower for all "
        "others. -KEY: highest first, +KEY: lowest first; ★ still marks the best run of a metric with a known "
        "direction. Default: the objective of the search that made these runs, else the loss, or the accuracy of the "
        "task where the runs differ in a key that is part of the loss",
    ),
    Option("--metrics A,B", "these metrics instead of loss, best, those of the task, tokens/s, memory and time"),
    Option("--pareto A,B", "mark the Pareto front: no run is better in A and not worse in B; -A, +A as in --sort"),
    Option("--all", "print all runs, not only the first 50 or the mean of one setting"),
    Option("--markdown", "for a report"),
    Option("--csv", "for a spreadsheet"),
    Option("--json", "for a program"),
    Option("--html FILE", "also write one self-contained page with the charts"),
    Option("--png DIR", "also write the charts as pictures"),
    Option("uri=STORE", "read this MLflow store instead of folders: a server, or sqlite:////path/mlflow.db"),
    notes="""A KEY is a parameter (lora.r, quant), a metric (eval/token_accuracy, eval_held_out/loss of evaluate), the
end of only one of them (r), or status, sweep, label (the name of the run; name means the same). loss is from the last
evaluation, best is the smallest one, memory the peak, time the seconds of training.
The exit code is 0; 2 if there is nothing to compare.""",
)

SHOWN, MOST_NEXT = 50, 8
CHOOSING = ("--where", "--by", "--sort", "--metrics", "--pareto")
"""Options that choose and order the runs and columns."""


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        RunnerError: an unknown run, option or key; no completed run; a file cannot be written.
    """
    args = VERB.read(argv)
    if len(chosen := [option for option in ("--markdown", "--csv", "--json") if args[option]]) > 1:
        raise ConfigError(Fault(" ".join(chosen), "are several output formats", "choose one of them"))
    source = _source(args)
    board = leaderboard.of(source.results, **{key.removeprefix("--"): args[key] or "" for key in CHOOSING})
    written = _write_files(board, source, args)
    with streams.piped():
        _print(board, args)
        for path in written:
            print(f"wrote {path}", file=sys.stderr if chosen else sys.stdout)
        if not chosen:
            print("\n".join(_hints(board, source, args)))
    return 0


@dataclass(frozen=True)
class _Source:
    """The runs to compare, and where they come from."""

    results: list[Result]
    title: str
    uri: str = ""
    """The MLflow store; empty if the runs were read from folders."""


def _source(args: Args) -> _Source:
    names = args.words
    if args["uri"]:
        return _from_store(args["uri"], names)
    embedded = args.outputs_dir.absolute() / "mlflow.db"
    try:
        return _from_folders(names, args.outputs_dir)
    except ConfigError as error:
        if not names or not embedded.exists():
            raise
        try:
            return _from_store(f"sqlite:///{embedded}", names)
        except UnknownNameError:
            raise error from None  # the error of the folders suggests similar names
        except TrackingError as failure:
            raise ConfigError(*error.faults, *failure.faults) from failure


def _from_store(uri: str, names: list[str]) -> _Source:
    from runner.report import mlflow_results

    if "://" not in uri:
        uri = f"sqlite:///{user_path(uri, 'uri').absolute()}"
    uri = store_lookup.checked(uri)
    return _Source(mlflow_results.read(uri, names), ", ".join(names) or uri, uri)


def _from_folders(names: Sequence[str], outputs_dir: Path) -> _Source:
    matches = [folder for name in names for folder, _ in lookup.resolve_or_scan(name, outputs_dir)]
    folders = {folder.path: folder for folder in (matches if names else _latest(outputs_dir))}
    rundirs = {
        rundir.path: rundir for folder in folders.values() for rundir in (
            [folder] if isinstance(folder, RunDir) else lookup.runs_of(folder)
        )
    }  # fmt: skip
    sweeps = [folder for folder in folders.values() if isinstance(folder, SweepDir)]
    title = f"sweep {sweeps[0].path.name}" if len(folders) == len(sweeps) == 1 else f"{len(rundirs)} runs"
    title = str(next(iter(rundirs)).name) if len(rundirs) == 1 and not sweeps else title
    return _Source(results.of_folders(list(rundirs.values()), outputs_dir), title)


def _latest(outputs_dir: Path) -> list[RunDir | SweepDir]:
    """The latest sweep; all runs if there is no sweep.

    Raises:
        ConfigError: there are no runs either.
    """
    folders = list(lookup.scan(outputs_dir))
    sweeps = [folder for folder in folders if isinstance(folder, SweepDir)]
    if sweeps:
        return [max(sweeps, key=lambda sweep: sweep.manifest.stat().st_mtime)]
    if not folders:
        place = terminal.nearest(outputs_dir.absolute())
        remedy = "python -m runner -m lora.r=8,16 trains two; outputs_dir=FOLDER reads another folder"
        raise ConfigError(Fault("", f"no runs below {place} yet", remedy))
    return folders


def _write_files(board: Leaderboard, source: _Source, args: Args) -> list[Path]:
    """Write the page and the pictures of ``--html`` and ``--png``; returns their paths.

    Raises:
        ConfigError: a file cannot be written.
    """
    written: list[Path] = []
    if not args["--html"] and not args["--png"]:
        return written
    from runner.report import charts, page

    drawn = page.drawing(board, source.uri, has_answers=bool(args["--html"]))
    if drawn.note:
        print(f"note  {drawn.note}", file=sys.stderr)
    for option in ("--html", "--png"):
        if not args[option]:
            continue
        path = user_path(args[option], option)
        try:
            if option == "--html":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(page.render(board, drawn, source.title), encoding="utf-8")
                written.append(path)
            else:
                written += charts.draw(board, drawn, path)
        except OSError as error:
            remedy = "give a file in a writable folder" if option == "--html" else "give another folder"
            raise ConfigError(Fault(option, f"cannot be written: {error.strerror}", remedy, path)) from error
    return written


def _print(board: Leaderboard, args: Args) -> None:
    if args["--json"]:
        steps = [{"parameter": each.parameter, "kind": each.kind, "text": each.text} for each in next_steps(board)]
        print(json.dumps({**leaderboard.as_json(board), "next": steps}, indent=1, allow_nan=False))
    elif args["--csv"]:
        names, rows = board.table()
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerows([names, *(["" if cell is None else cell for cell in row] for row in rows)])
    elif args["--markdown"]:
        print(markdown(board))
    else:
        _show(board, args["--all"])


def markdown(board: Leaderboard) -> str:
    """The table of runs, and the table of means if there is one, in GitHub's Markdown."""
    groups = [f"**{board.group_heading()}**", _markdown(board.group_titles(), board.group_rows())]
    tables = [*(groups if board.has_means else []), _markdown(board.titles(), board.rows())]
    found = [f"- {each}" for each in next_steps(board)]
    after = ["\n".join(["**What to try next**", "", *found])] if found else []
    return "\n\n".join([*tables, board.legend(), *(f"> {note}" for note in board.notes), *after])


def next_steps(board: Leaderboard) -> list[Advice]:
    """What to try next, by the completed runs; empty if no parameter has several values."""
    return advice.of(board.results, board.params, board.goal, board.over)


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, rows)])


def _show(board: Leaderboard, is_all: bool) -> None:
    """Print the tables, then the reasons of failed runs and the notes."""
    if board.has_means:
        _table(board.group_heading(), board.group_titles(), board.group_rows(), lead=board.params)
        print()
    rows = board.rows()
    shown = rows if is_all else [] if board.is_one_setting else rows[:SHOWN]
    if shown:
        _table("", board.titles(), shown, lead=["run", "status", *board.params])
        print(board.legend())
    if len(shown) < len(rows):
        hidden = Counter(result.status for result in board.results[len(shown) :])
        counts = ", ".join(f"{count} {status}" for status, count in hidden.items())
        more = f"and {len(rows) - len(shown)} more" if shown else f"{len(rows)} runs"
        print(f"{more} ({counts}): --all shows them")
    for result in board.results if is_all else board.results[:SHOWN]:
        if result.reason:
            print(f"{result.status}  {result.run}: {result.reason}")
    for note in board.notes:
        print(f"note  {note}")
    for each in next_steps(board)[:MOST_NEXT]:
        print(f"next  {each}")


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], lead: Sequence[str]) -> None:
    """Print a table with numbers aligned right. Written to a file or pipe, it is as wide as its content."""
    from rich import box
    from rich.table import Table

    if title:  # printed here: rich would wrap a title at the width of the table
        print(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in titles:
        is_text = name in lead or name == leaderboard.VERDICT
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*row, style="bold" if "★" in row[0] or "★" in row[-1] else None)
    needed = sum(max(len(row[column]) for row in [titles, *rows]) + 3 for column in range(len(titles)))
    terminal.console(width=None if sys.stdout.isatty() else needed).print(table)


def _hints(board: Leaderboard, source: _Source, args: Args) -> list[str]:
    """Commands to run next."""
    completed = [result for result in board.results if result.is_completed]
    rated = sorted((r for r in completed if r is not board.best), key=board.goal.cost)
    best, runs = _typed(board.best), len(board.results)
    where = [f"uri={source.uri}"] if source.uri else []
    key = board.goal.key
    number = columns.text(key, columns.value(board.best, key))
    hints = [f"best      {board.best.label}: {columns.title(key)} {number}"]
    if rated:
        elsewhere = where if not (board.best.folder and rated[0].folder) else []
        hints.append(" ".join([f"diff      python -m runner diff {best} {_typed(rated[0])}", *elsewhere]))
    if board.best.folder and (Path(board.best.folder) / "model").is_dir():
        hints.append(f"generate  python -m runner generate {best}")
    if failed := next((one for one in board.results if one.status == "failed" and one.folder), None):
        hints.append(f"log       python -m runner logs {_typed(failed)}")
    if runs > 1 and not args["--html"]:
        outputs = [f"outputs_dir={args.outputs_dir}"] if str(args.outputs_dir) != "outputs" else []
        chosen = [f"{option}={args[option]}" for option in CHOOSING if args[option]]
        again = shlex.join(["python", "-m", "runner", "compare", *args.words, *where, *outputs, *chosen])
        hints.append(f"page      {again} --html compare.html")
    return ["", *hints]


def _typed(result: Result) -> str:
    """The run as an argument of a command line."""
    return terminal.typed(terminal.nearest(Path(result.folder))) if result.folder else result.run
