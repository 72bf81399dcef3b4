"""The verb ``sync``: upload runs to MLflow that are missing or incomplete there."""

from __future__ import annotations

import sys

from runner.cli.args import RUN, Option, Verb
from runner.errors import ConfigError
from runner.report import publish
from runner.tracking import lookup
from runner.tracking.mirror.sync import ELSEWHERE, MIRRORED, UNBEGUN, left_out, sync

VERB = Verb(
    "sync [RUN|SWEEP|FOLDER …]",
    f"""Uploads to MLflow what is missing there of these runs, or of all runs below outputs_dir, and closes runs whose
process died. A run is in one store: a run that is already in another store stays there, unless that store was a file
and is gone. compare, diff and ui read any store (uri=…).

  python -m runner sync                                all runs below outputs/
  python -m runner sync ablation uri=http://host:5000  a sweep that was trained with tracking=offline

{RUN};
SWEEP a name or a folder; FOLDER a folder of runs.""",
    Option("tracking.uri=URI, uri=URI", "the store for runs with tracking=offline instead of the embedded database"),
)


def main(argv: list[str]) -> int:
    """The verb; returns the exit code: 1 if something could not be uploaded.

    Raises:
        ConfigError: a word that names no run, sweep or folder.
    """
    args = VERB.read(argv)
    folders = [folder.path for name in args.words for folder, _ in lookup.resolve_or_scan(name, args.outputs_dir)]
    results = sync(folders or [args.outputs_dir], args["uri"], publish.send)
    elsewhere = [result for result in results if result.problem.startswith(ELSEWHERE)]
    results = [result for result in results if result not in elsewhere]
    if elsewhere and not results:
        raise ConfigError(*left_out(elsewhere))
    for fault in left_out(elsewhere):
        print(f"skipped  {fault}", file=sys.stderr)
    failed = [result for result in results if result.problem not in ("", UNBEGUN, MIRRORED)]
    for result in results:
        out = sys.stderr if result in failed else sys.stdout
        print(f"{result.folder}  {result.status}  {result.problem or result.url or 'uploaded'}", file=out)
    return int(bool(failed))
