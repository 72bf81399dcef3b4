"""The verb ``compare``: which setting was better."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import terminal
from runner.cli import args
from runner.errors import ConfigError, Fault, TrackingError, UnknownNameError
from runner.report import columns, leaderboard, record, results
from runner.report.leaderboard import Leaderboard
from runner.report.results import Result
from runner.tracking import lookup
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

HELP = """python -m runner compare [SWEEP|RUN|FOLDER|EXPERIMENT …] [uri=STORE] [options] [outputs_dir=FOLDER]

Which setting was better: the parameters that differ between the runs, beside the metrics that matter. Without words it
is the latest sweep.

  python -m runner compare lora.r+quant                          the runs of that sweep, the best first
  python -m runner compare --by seed                             mean and 95 % interval over the seeds of each setting
  python -m runner compare --where "lora.r>=8 and quant=4bit"    some of them
  python -m runner compare --pareto memory,loss                  which trade-offs are worth having
  python -m runner compare --html report.html                    a page with curves and charts, to keep or to send
  python -m runner compare uri=http://host:5000 my-experiment    asked of MLflow, not of folders

RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id; SWEEP its name or its
folder. EXPERIMENT is MLflow's; uri names a server or sqlite:////path/mlflow.db, by default the database embedded in
outputs_dir. One store is asked at a time, and runs of different tasks are not compared.
  --where CONDITION  KEY=VALUE, !=, <, <=, >, >=, ~ (contains), with and, or, not and brackets
  --metrics A,B      these instead of loss, best, tokens/s, memory and time
  --sort KEY         the better first: accuracy, acc, f1, mfu, per_second, reward and such get better upwards, all else
                     downwards; -KEY upwards, +KEY downwards. ★ stays with the better end of a metric whose name says
                     it. Without --sort: what a search of these runs looked for, else the loss
  --by KEY           take runs together that differ in KEY alone; where nothing else differs only their mean is shown
  --pareto A,B       mark the runs that none beats in one without being worse in another; -A and +A as above
  --all              all runs on the terminal, not only the first 50, or the mean of one setting
  --markdown, --csv, --json      for a report, a spreadsheet, a program
  --html FILE        one page, complete in itself         --png DIR   its charts as pictures
A KEY is a parameter (lora.r, quant), a metric (eval/token_accuracy, eval_held_out/loss of the verb evaluate), an end of
one that is unique (r), or status, sweep, label (what the run is called; name means the same). loss is that of the last
evaluation, best the smallest one, memory the peak, time the seconds of training.
The exit code is 0; 2 where there is nothing to compare."""

SHOWN = 50
CHOOSING = ("--where", "--by", "--sort", "--metrics", "--pareto")
"""Options that say what is compared, and how."""


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        RunnerError: a word, an option or a key that means nothing; no run is completed; a file cannot be written.
    """
    forms = ("--markdown", "--csv", "--json")
    words = args.read(argv, HELP, flags=("--all", *forms), valued=(*CHOOSING, "--html", "--png"))
    if words is None:
        return 0
    if len(chosen := [form for form in forms if words.has(form)]) > 1:
        raise ConfigError(Fault(" ".join(chosen), "is more than one form", "choose one of them"))
    source = _source(words)
    how = {option.removeprefix("--"): words.options.get(option, "") for option in CHOOSING}
    made = leaderboard.of(source.results, **how)
    written = _write_files(made, source, words)
    with terminal.piped():
        _print(made, words)
        for path in written:
            print(f"wrote {path}", file=sys.stderr if chosen else sys.stdout)
        if not chosen:
            print("\n".join(_hints(made, source, words)))
    return 0


@dataclass(frozen=True)
class _Source:
    """The runs that are compared, and where they were found."""

    results: list[Result]
    title: str
    uri: str = ""
    """Of the MLflow store; empty where folders were read."""


def _source(words: args.Args) -> _Source:
    uris = [word.removeprefix("uri=") for word in words.words if word.startswith("uri=")]
    names = [word for word in words.words if not word.startswith("uri=")]
    if uris:
        return _from_store(uris[-1], names)
    embedded = words.outputs_dir.absolute() / "mlflow.db"
    try:
        return _from_folders(names, words.outputs_dir)
    except ConfigError as error:
        if not names or not embedded.exists():
            raise

        try:
            return _from_store(f"sqlite:///{embedded}", names)
        except UnknownNameError:
            raise error from None  # the folders' answer names what is near
        except TrackingError as failure:
            raise ConfigError(*error.faults, *failure.faults) from failure


def _from_store(uri: str, names: list[str]) -> _Source:
    from runner.report import mlflow_results

    if "://" not in uri:
        uri = f"sqlite:///{Path(uri).expanduser().absolute()}"
    uri = record.checked(uri)
    return _Source(mlflow_results.read(uri, names), ", ".join(names) or uri, uri)


def _from_folders(names: Sequence[str], outputs_dir: Path) -> _Source:
    found: dict[Path, RunDir | SweepDir] = {}
    for name in names:
        found.update({what.path: what for what, _ in lookup.meant(name, outputs_dir)})
    if not names:
        found = {what.path: what for what in _latest(outputs_dir)}
    rundirs = {
        rundir.path: rundir for what in found.values() for rundir in (
            [what] if isinstance(what, RunDir) else lookup.runs_of(what)
        )
    }  # fmt: skip
    sweeps = [what for what in found.values() if isinstance(what, SweepDir)]
    title = f"sweep {sweeps[0].path.name}" if len(found) == len(sweeps) == 1 else f"{len(rundirs)} runs"
    title = str(next(iter(rundirs)).name) if len(rundirs) == 1 and not sweeps else title
    return _Source(results.of_folders(list(rundirs.values()), outputs_dir), title)


def _latest(outputs_dir: Path) -> list[RunDir | SweepDir]:
    """The latest sweep; where there is none, all runs.

    Raises:
        ConfigError: there are none either.
    """
    there = list(lookup.scan(outputs_dir))
    sweeps = [what for what in there if isinstance(what, SweepDir)]
    if sweeps:
        return [max(sweeps, key=lambda sweep: sweep.manifest.stat().st_mtime)]
    if not there:
        place = terminal.nearest(outputs_dir.absolute())
        remedy = "python -m runner -m lora.r=8,16 starts two; outputs_dir=FOLDER names another folder"
        raise ConfigError(Fault("", f"there are no runs below {place} yet", remedy))
    return there


def _write_files(made: Leaderboard, source: _Source, words: args.Args) -> list[Path]:
    """The page and the pictures that are asked for.

    Raises:
        ConfigError: one of them cannot be written.
    """
    written: list[Path] = []
    if not {"--html", "--png"} & set(words.options):
        return written
    from runner.report import charts, page

    drawn = page.drawing(made, source.uri)
    for option in ("--html", "--png"):
        if not words.has(option):
            continue
        path = Path(words.options[option]).expanduser()
        try:
            if option == "--html":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(page.render(made, drawn, source.title), encoding="utf-8")
                written.append(path)
            else:
                written += charts.draw(made, drawn, path)
        except OSError as error:
            remedy = "name a file in a folder that can be written" if option == "--html" else "name another folder"
            raise ConfigError(Fault(option, f"cannot be written: {error.strerror}", remedy, path)) from error
    return written


def _print(made: Leaderboard, words: args.Args) -> None:
    if words.has("--json"):
        print(json.dumps(leaderboard.as_json(made), indent=1, allow_nan=False))
    elif words.has("--csv"):
        names, rows = made.table()
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerows([names, *(["" if cell is None else cell for cell in row] for row in rows)])
    elif words.has("--markdown"):
        print(markdown(made))
    else:
        _show(made, words.has("--all"))


def markdown(made: Leaderboard) -> str:
    """The table, and that of the groups, as GitHub and others show it."""
    groups = [f"**{made.group_heading()}**", _markdown(made.group_titles(), made.group_rows())]
    tables = [*(groups if made.has_means else []), _markdown(made.titles(), made.rows())]
    return "\n\n".join([*tables, *(f"> {note}" for note in made.notes)])


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, rows)])


def _show(made: Leaderboard, is_all: bool) -> None:
    """The tables on the terminal, then why runs failed and what is to be borne in mind."""
    if made.has_means:
        _table(made.group_heading(), made.group_titles(), made.group_rows(), lead=made.params)
        print()
    rows = made.rows()
    shown = rows if is_all else [] if made.is_one_setting else rows[:SHOWN]
    if shown:
        _table("", made.titles(), shown, lead=["run", "status", *made.params])
    if len(shown) < len(rows):
        left = Counter(result.status for result in made.results[len(shown) :])
        counts = ", ".join(f"{count} {status}" for status, count in left.items())
        more = f"and {len(rows) - len(shown)} more" if shown else f"{len(rows)} runs"
        print(f"{more} ({counts}): --all shows them")
    for result in made.results if is_all else made.results[:SHOWN]:
        if result.reason:
            print(f"{result.status}  {result.run}: {result.reason}")
    for note in made.notes:
        print(f"note  {note}")


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], lead: Sequence[str]) -> None:
    """A table whose numbers stand right; what goes into a file is as wide as it needs to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if title:  # not the table's own, which it breaks at its width
        print(title)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in titles:
        is_text = name in lead or name == leaderboard.VERDICT
        drawn.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        drawn.add_row(*row, style="bold" if "★" in row[0] or "★" in row[-1] else None)
    needed = sum(max(len(row[column]) for row in [titles, *rows]) + 3 for column in range(len(titles)))
    out = terminal.console() if sys.stdout.isatty() else Console(width=needed, highlight=False, markup=False)
    out.print(drawn)


def _hints(made: Leaderboard, source: _Source, words: args.Args) -> list[str]:
    """What to do next."""
    completed = [result for result in made.results if result.is_completed]
    rated = sorted((r for r in completed if r is not made.best), key=made.goal.cost)
    best, runs = _typed(made.best), len(made.results)
    where = [f"uri={source.uri}"] if source.uri else []
    key = made.goal.key
    number = columns.text(key, columns.value(made.best, key))
    hints = [f"best      {made.best.label}: {columns.title(key)} {number}"]
    if rated:
        elsewhere = where if not (made.best.folder and rated[0].folder) else []
        hints.append(" ".join([f"diff      python -m runner diff {best} {_typed(rated[0])}", *elsewhere]))
    if made.best.folder and (Path(made.best.folder) / "model").is_dir():
        hints.append(f"generate  python -m runner generate {best}")
    if failed := next((one for one in made.results if one.status == "failed" and one.folder), None):
        hints.append(f"log       python -m runner logs {_typed(failed)}")
    if runs > 1 and not words.has("--html"):
        names = [word for word in words.words if not word.startswith("uri=")]
        outputs = [f"outputs_dir={words.outputs_dir}"] if str(words.outputs_dir) != "outputs" else []
        chosen = [f"{option}={value}" for option, value in words.options.items() if option in CHOOSING]
        again = shlex.join(["python", "-m", "runner", "compare", *names, *where, *outputs, *chosen])
        hints.append(f"page      {again} --html compare.html")
    return ["", *hints]


def _typed(result: Result) -> str:
    """How the run is named on a command line."""
    return shlex.quote(terminal.nearest(Path(result.folder))) if result.folder else result.run
