"""The verb ``sync``: upload runs to MLflow that are missing or incomplete there."""

from __future__ import annotations

import sys

from runner.cli import args
from runner.errors import ConfigError
from runner.report import publish
from runner.tracking import lookup
from runner.tracking.mirror.sync import ELSEWHERE, MIRRORED, UNBEGUN, left_out, sync

HELP = """python -m runner sync [RUN|SWEEP|FOLDER …] [uri=URI] [outputs_dir=FOLDER]

Uploads to MLflow what is missing there of these runs, or of all runs below outputs_dir, and closes runs whose process
died. Runs with tracking=offline go to the embedded database, or to URI. A run is in one store: a run that is already
in another store stays there, unless that store was a file and is gone. compare, diff and ui read any store (uri=…).
RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id; SWEEP a name or a
folder; FOLDER a folder of runs."""


def main(argv: list[str]) -> int:
    """The verb; returns the exit code: 1 if something could not be uploaded.

    Raises:
        ConfigError: a word that names no run, sweep or folder.
    """
    words = args.read(argv, HELP)
    if words is None:
        return 0
    names, settings = args.settings(words.words, ("uri", "tracking.uri"))
    folders = [folder.path for name in names for folder, _ in lookup.meant(name, words.outputs_dir)]
    uri = settings.get("uri") or settings.get("tracking.uri")
    results = sync(folders or [words.outputs_dir], uri, publish.send)
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
