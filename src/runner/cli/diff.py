"""The verb ``diff``: configuration, code, data, hardware and results of two runs, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from runner import streams
from runner.cli.args import RUN, URI, Args, Option, Verb
from runner.errors import ConfigError, Fault
from runner.report import diff, record
from runner.report.diff import Numbers, Row, Section
from runner.report.record import Recorded

VERB = Verb(
    "diff RUN RUN",
    f"""Two runs side by side: configuration, code (commit, uncommitted changes, the files and lines in between),
packages, data, hardware and results. Only what differs is shown.

  python -m runner diff outputs/2026-01-31/12-00-00 outputs/2026-01-31/12-30-00
  python -m runner diff lora.r=8 lora.r=16 --all      two jobs of a sweep, equal values too
  python -m runner diff 3f2a 91c0 uri=https://…       two runs whose folders are on other machines
  python -m runner diff 3f2a outputs/mine --patch     with the lines of code

{RUN}.""",
    Option("--all", "also values that are equal"),
    Option("--patch", "the lines of code that differ, with uncommitted changes"),
    Option("--json", 'everything, for programs: {"runs", "sections", "files", "numbers"}'),
    Option("--markdown", "the same as Markdown tables"),
    URI,
    notes="The exit code is 0, whether the runs differ or not.",
)

WIDEST = 60
"""Characters of a value; longer values are cut in the middle, but not in JSON."""
_FRACTION = re.compile(r"-?\d+\.\d+(e-?\d+)?")
_DIGEST = re.compile(r"[0-9a-f]{32,}")


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: not two runs, the same run twice, a run that never started, or an unknown run.
    """
    args = VERB.read(argv)
    if args["--json"] and args["--patch"]:
        raise ConfigError(Fault("--patch", "has no effect with --json", "leave one of them out"))
    if args["--json"] and args["--markdown"]:
        raise ConfigError(Fault("--markdown", "cannot be combined with --json", "leave one of them out"))
    ours, theirs = _two_runs(args)
    sections, numbers = diff.of(ours, theirs), diff.numbers(ours.curves, theirs.curves)
    with streams.piped():
        if args["--json"]:
            print(json.dumps(_as_json(ours, theirs, sections, numbers), indent=1), flush=True)
        else:
            shown = _markdown if args["--markdown"] else _text
            print(shown(ours, theirs, sections, numbers, everything=args["--all"]))
            if args["--patch"]:
                print(f"\n{diff.patch(ours, theirs)}".rstrip() or "\nno lines of code differ, according to git")
    return 0


def _two_runs(args: Args) -> tuple[Recorded, Recorded]:
    if len(args.words) != 2:
        raise VERB.misused(f"needs two runs, not {len(args.words)}")
    ours, theirs = (record.find(word, args.outputs_dir, args["uri"]) for word in args.words)
    if ours.manifest.get("id") == theirs.manifest.get("id"):
        problem = f"'{args.words[0]}' and '{args.words[1]}' are the same run, {ours.where}"
        raise ConfigError(Fault("diff", problem, "give two different runs: python -m runner status lists them"))
    for run in (ours, theirs):
        record.refuse_unbegun(run, "there is nothing to compare yet")
    return ours, theirs


def _text(ours: Recorded, theirs: Recorded, sections: Sequence[Section], numbers: Numbers, *, everything: bool) -> str:
    head = [Row("run", ours.where, theirs.where), Row("name", ours.name, theirs.name)]
    head += [Row("MLflow", ours.mlflow_id[:8], theirs.mlflow_id[:8])] if ours.mlflow_id or theirs.mlflow_id else []
    tables = [(Section("", head), head), *((section, _shown(section, everything)) for section in sections)]
    cells = [(_key(row, section.title), *_values(row, section.title)) for section, rows in tables for row in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(2)]
    lines: list[str] = []
    for section, rows in tables:
        title = section.title
        lines += ["", title] if title and (rows or section.files or section.note) else []
        for row in rows:
            key, (middle, right) = _key(row, title), _values(row, title)
            lines.append(f"{key:<{widths[0]}}  {middle:<{widths[1]}}  {right}{_change(row, title)}".rstrip())
        lines += [f"  {changed}" for changed in section.files]
        lines += [f"  {section.note}"] if section.note else []
    equal = [section.title for section in sections if not section.differs]
    lines += ["", f"the same: {', '.join(equal)}"] if equal else []
    return "\n".join([*lines, "", _verdict(numbers)])


def _markdown(
    ours: Recorded, theirs: Recorded, sections: Sequence[Section], numbers: Numbers, *, everything: bool
) -> str:
    def cell(text: str) -> str:
        return _short(text).replace("|", "\\|").replace("\n", " ") or "–"

    lines = [f"| | {cell(ours.where)} | {cell(theirs.where)} |", "|---|---|---|"]
    for section in sections:
        rows = _shown(section, everything)
        lines += [f"| **{section.title}** | | |"] if rows else []
        lines += [f"| {cell(row.key)} | {' | '.join(map(cell, _values(row, section.title)))} |" for row in rows]
    for section in sections:
        lines += [""] if section.files or section.note else []
        lines += [f"- `{changed.file}` {str(changed).removeprefix(changed.file).strip()}" for changed in section.files]
        lines += [f"- {section.note}"] if section.note else []
    return "\n".join([*lines, "", _verdict(numbers)])


def _as_json(ours: Recorded, theirs: Recorded, sections: Sequence[Section], numbers: Numbers) -> dict[str, Any]:
    runs = [
        {"name": run.name, "folder": str(run.folder) if run.folder else None, "mlflow_run_id": run.mlflow_id or None,
         "signature": run.manifest.get("signature"), "status": run.status}
        for run in (ours, theirs)
    ]  # fmt: skip
    tables = {
        section.title: {row.key: {"values": [row.ours, row.theirs], "differs": row.differs} for row in section.rows}
        for section in sections
    }
    code = next(section for section in sections if section.title == "code")
    return {"runs": runs, "sections": tables, "files": [asdict(changed) for changed in code.files],
            "note": code.note, "numbers": asdict(numbers)}  # fmt: skip


def _shown(section: Section, everything: bool) -> list[Row]:
    return [row for row in section.rows if everything or row.differs]


def _key(row: Row, title: str) -> str:
    return f"  {row.key}" if title else row.key


def _values(row: Row, title: str) -> tuple[str, str]:
    """Both values as text: results with six digits, or with all digits if they would look equal."""
    ours, theirs = (
        f"{float(text):.6g}" if title == "results" and _FRACTION.fullmatch(text) else text
        for text in (row.ours, row.theirs)
    )
    return (_short(row.ours), _short(row.theirs)) if row.differs and ours == theirs else (_short(ours), _short(theirs))


def _short(text: str) -> str:
    text = text[:12] if _DIGEST.fullmatch(text) else text
    half = WIDEST // 2
    return (text if len(text) <= WIDEST else f"{text[: half - 1]}…{text[-half:]}") or "–"


def _change(row: Row, title: str) -> str:
    """By how much a result differs."""
    if title != "results" or not row.differs:
        return ""
    try:
        return f"  ({float(row.theirs) - float(row.ours):+.4g})"
    except ValueError:
        return ""


def _verdict(numbers: Numbers) -> str:
    if not numbers.steps:
        return "the runs have no step in common with the same metrics"
    if numbers.first is None:
        return f"losses and evaluations are identical, bit by bit, at all {numbers.steps} steps that both runs have"
    step, name, ours, theirs = numbers.first
    return f"the metrics first differ at step {step}: {name} {ours!r} and {theirs!r}"
