"""The verb ``sync``: upload to MLflow what is missing there."""

from __future__ import annotations

import sys

from runner.cli import args
from runner.errors import ConfigError
from runner.report import publish
from runner.tracking import lookup
from runner.tracking.mirror.sync import ELSEWHERE, MIRRORED, UNBEGUN, left_out, sync

SYNC_HELP = """python -m runner sync [RUN|SWEEP|FOLDER …] [uri=URI] [outputs_dir=FOLDER]

Brings into MLflow what it has not got yet of these runs, or of all below outputs_dir, and closes runs whose process
died. Runs of tracking=offline go to the embedded database, or to URI. A run is in one store: what is in another one
already stays there, unless that is a file which is gone; compare, diff and ui read any store (uri=…).
RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id; SWEEP a name or a
folder; FOLDER one of runs."""


def main(argv: list[str]) -> int:
    """The verb ``sync``; returns the exit code, 1 where something could not be brought.

    Raises:
        ConfigError: a word that means no run, sweep or folder.
    """
    words = args.read(argv, SYNC_HELP)
    if words is None:
        return 0
    names, given = args.settings(words.words, ("uri", "tracking.uri"))
    folders = [what.path for name in names for what, _ in lookup.meant(name, words.outputs_dir)]
    results = sync(folders or [words.outputs_dir], given.get("uri") or given.get("tracking.uri"), publish.send)
    kept = [result for result in results if result.problem.startswith(ELSEWHERE)]
    results = [result for result in results if result not in kept]
    if kept and not results:
        raise ConfigError(*left_out(kept))
    for fault in left_out(kept):
        print(f"left out  {fault}", file=sys.stderr)
    failed = [result for result in results if result.problem not in ("", UNBEGUN, MIRRORED)]
    for result in results:
        out = sys.stderr if result in failed else sys.stdout
        print(f"{result.folder}  {result.status}  {result.problem or result.url or 'is in MLflow'}", file=out)
    return int(bool(failed))
