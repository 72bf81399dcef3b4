"""Find the run or sweep for RUN: a folder, an MLflow run id, a Slurm job id, or the name of a run or sweep.

Reads every manifest below the outputs folder once; skips damaged ones with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import terminal
from runner.errors import ConfigError, DamagedError, Fault, suggest
from runner.files import user_path
from runner.tracking import slurm_client
from runner.tracking.naming import short_name
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir, slurm_room, sweep_of

JOB_ID = re.compile(r"\d+(_\d+)?")
"""A Slurm job, or a task of a job array."""
SHORTEST_ID = 4
"""Minimum characters of an MLflow run id prefix: shorter words are more likely part of a name."""
SHOWN, WIDEST = 8, 48
"""Maximum lines of a list in a message, and maximum characters of a name in it."""
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""Errors of reading a run folder with damaged files."""
log = logging.getLogger("runner")


def resolve(word: str, outputs_dir: Path) -> RunDir | SweepDir:
    """The run or sweep that ``word`` names.

    ``word`` may be a folder (relative to the current directory or to ``outputs_dir``, or its last component only), a
    unique prefix of an MLflow id, a Slurm job id (of any folder, if Slurm still knows it), a name, SWEEP/LABEL, or some
    parts of a label (``quant=4bit,lora.r=8``).

    Raises:
        ConfigError: no match (with the nearest names), or several matches (with all of them).
    """
    if folder := _folder(word, outputs_dir):
        return folder
    entries = list(_entries(outputs_dir, word))
    matches = _without_runs_of_matching_sweeps([entry for entry in entries if word in entry.names])
    matches = matches or [entry for entry in entries if word == entry.what.path.name]
    if not matches and len(word) >= SHORTEST_ID:
        matches = [entry for entry in entries if entry.mlflow_id.startswith(word)]
    matches = matches or [entry for entry in entries if any(_has_parts(name, word) for name in entry.names)]
    if len(matches) == 1:
        return matches[0].what
    if matches:
        remedy = f"name one of these folders:{_listed(matches)}"
        raise ConfigError(Fault("", f"'{word}' is the name of {len(matches)} runs", remedy))
    if found := JOB_ID.fullmatch(word) and _of_slurm_job(word):
        return found
    raise ConfigError(
        Fault("", f"there is no run or sweep '{word}' below {outputs_dir}", _nearest(word, entries, outputs_dir))
    )


def _of_slurm_job(word: str) -> RunDir | SweepDir | None:
    """The run or sweep of a job whose folder Slurm knows; None if it does not."""
    if (room := slurm_client.output_folder(word)) is None:
        return None
    if room.name == slurm_room(room).name and (home := _folder(str(room.parent), room)):
        entries = list(_entries(home.path, word))
        matches = [entry.what for entry in entries if word in entry.names]
        if not matches and any(name.startswith(f"{word}_") for entry in entries for name in entry.names):
            matches = [home]  # an array
        if matches:
            return matches[0]
    problem = f"the Slurm job {word} belongs to no run: its output is in {room}"
    raise ConfigError(Fault("", problem, "name a run, or the job id of one"))


def resolve_run(word: str, outputs_dir: Path) -> RunDir:
    """The single run that ``word`` names.

    Raises:
        ConfigError: as ``resolve``; also for a sweep (with its runs).
    """
    match = resolve(word, outputs_dir)
    if isinstance(match, RunDir):
        return match
    lines = _lines(_runs_of_sweep(match))
    raise ConfigError(Fault("", f"'{word}' is a sweep, but one run is required", f"name one of its runs:{lines}"))


def resolve_or_scan(word: str, outputs_dir: Path) -> list[tuple[RunDir | SweepDir, bool]]:
    """(run or sweep, True) if ``word`` names one, else (…, False) for all runs and sweeps below the folder ``word``."""
    try:
        return [(resolve(word, outputs_dir), True)]
    except ConfigError:
        folders = [path for path in (user_path(word), outputs_dir / word) if os.path.isdir(path)]
        contents = [(what, False) for path in folders[:1] for what in scan(path.resolve())]
        if not contents:
            raise
        return contents


def scan(folder: Path) -> Iterator[RunDir | SweepDir]:
    """The run or sweep in ``folder`` itself, else all runs and sweeps below it; a sweep is one item, without its runs.

    Checks file names only, and does not descend into a run or a sweep.
    """
    for path, subfolders, files in os.walk(folder.absolute()):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "mlartifacts")
        if "sweep.json" in files:
            subfolders.clear()
            yield SweepDir(Path(path))
        elif "state.json" in files or "manifest.json" in files:
            subfolders.clear()
            yield RunDir(Path(path))


def find_runs(folder: Path) -> list[RunDir]:
    """``folder`` if it is a run folder, else all run folders below it, sorted by path.

    Raises:
        ConfigError: no run folder there.
    """
    rundirs = []
    for path, subfolders, files in os.walk(folder.absolute()):
        subfolders[:] = sorted(name for name in subfolders if name != "mlartifacts")  # copies of manifests
        if {"state.json", "manifest.json"} & set(files):
            subfolders.clear()
            rundirs.append(RunDir(Path(path)))
    if not rundirs:
        raise ConfigError(Fault("", f"{folder} contains no run", "name a run folder, or a folder with run folders"))
    return rundirs


def runs_of(sweep: SweepDir) -> list[RunDir]:
    """The runs of a sweep; an empty list and a warning if sweep.json cannot be read."""
    try:
        return sweep.rundirs()
    except DAMAGED as error:
        warn_damaged(sweep.path, error)
        return []


def warn_damaged(folder: Path, error: Exception) -> None:
    """Warn that a folder is skipped."""
    problem = error.faults[0].problem if isinstance(error, DamagedError) else f"{type(error).__name__}: {error}"
    log.warning(f"skipped, its files cannot be read: {folder} ({problem})")


@dataclass(frozen=True)
class _Entry:
    """A run or a sweep with its names."""

    what: RunDir | SweepDir
    names: tuple[str, ...]
    mlflow_id: str
    created: float

    def line(self, name: str) -> str:
        created = time.strftime(", created %F %T", time.localtime(self.created)) if self.created else ""
        kind = "sweep" if isinstance(self.what, SweepDir) else "run"
        return f"{terminal.nearest(self.what.path)}  ({kind} {name}{created})"


def _entries(outputs_dir: Path, word: str) -> Iterator[_Entry]:
    for what in scan(outputs_dir):
        yield from _of_sweep(what, word) if isinstance(what, SweepDir) else _of_run(what)


def _of_sweep(sweep: SweepDir, word: str) -> Iterator[_Entry]:
    """The sweep and its runs; without them if ``word`` names it, see ``_without_runs_of_matching_sweeps``."""
    try:
        manifest = sweep.read()
        mlflow_id = str((manifest.get("mlflow") or {}).get("parent_run_id") or "")
        name = str(manifest.get("name") or sweep.path.name)
        yield _Entry(sweep, (name, sweep.path.name), mlflow_id, float(manifest.get("created") or 0))
        rundirs = [] if word in (name, sweep.path.name) else sweep.rundirs()
    except DAMAGED as error:
        return warn_damaged(sweep.path, error)
    for rundir in rundirs:
        yield from _of_run(rundir, name)


def _of_run(rundir: RunDir, sweep: str = "") -> Iterator[_Entry]:
    try:
        manifest = rundir.read_manifest()
        own = [manifest.get("label"), manifest.get("name"), rundir.path.name if sweep else None, short_name(manifest)]
        names = [str(name) for name in dict.fromkeys(own) if name]
        names += [f"{sweep}/{name}" for name in names if sweep]
        names += [str(job) for job in [(manifest.get("slurm") or {}).get("job_id")] if job]
        mlflow_id = str((manifest.get("mlflow") or {}).get("run_id") or "")
        yield _Entry(rundir, tuple(names) or (rundir.path.name,), mlflow_id, float(manifest.get("created") or 0))
    except DAMAGED as error:
        warn_damaged(rundir.path, error)


def _folder(word: str, outputs_dir: Path) -> RunDir | SweepDir | None:
    for path in (user_path(word).absolute(), outputs_dir.absolute() / word):
        if os.path.exists(path / "sweep.json"):  # False for a name that is too long for a folder, as a label may be
            return SweepDir(path.resolve())
        if os.path.exists(path / "state.json") or os.path.exists(path / "manifest.json"):
            return RunDir(path.resolve())
    return None


def _has_parts(name: str, word: str) -> bool:
    """Whether ``name`` has all comma-separated parts of ``word``, and both have the same sweep prefix (or none)."""
    (name_sweep, _, label), (word_sweep, _, parts) = name.rpartition("/"), word.rpartition("/")
    return name_sweep == word_sweep and set(parts.split(",")) <= set(label.split(","))


def _without_runs_of_matching_sweeps(matches: list[_Entry]) -> list[_Entry]:
    """A sweep and its runs may have the same name: then the name means the sweep."""
    sweeps = {entry.what.path for entry in matches if isinstance(entry.what, SweepDir)}
    return [entry for entry in matches if isinstance(entry.what, SweepDir) or not _is_in(entry.what, sweeps)]


def _is_in(rundir: RunDir, sweeps: set[Path]) -> bool:
    sweep = sweep_of(rundir)
    return sweep is not None and sweep.path in sweeps


def _nearest(word: str, entries: list[_Entry], outputs_dir: Path) -> str:
    """A remedy with the names nearest to ``word``."""
    if not entries:
        return "set outputs_dir=FOLDER to search another folder"
    if matches := [entry for entry in entries if _begins(entry, word, outputs_dir)]:
        return f"names that begin with '{word}' ({len(matches)}):{_listed(matches)}"
    if len(word) < SHORTEST_ID and (matches := [entry for entry in entries if entry.mlflow_id.startswith(word)]):
        return f"for an MLflow run id give {SHORTEST_ID} characters or more; ids with this prefix:{_listed(matches)}"
    if matches := [entry for entry in entries if any(word.lower() in name.lower() for name in entry.names)]:
        return f"names that contain '{word}' ({len(matches)}):{_listed(matches)}"
    names = {name for entry in entries for name in (*entry.names, terminal.nearest(entry.what.path))}
    if hint := suggest(word, names) or suggest(word, {part for name in names for part in name.split(",")}):
        return hint
    if JOB_ID.fullmatch(word):
        return "Slurm knows no such job either; of an older one set outputs_dir=FOLDER, or name its run"
    forms = f"a folder, a name or the beginning of an MLflow run id ({SHORTEST_ID} characters or more)"
    return f"RUN is {forms}; the latest:{_listed(entries)}"


def _begins(entry: _Entry, word: str, outputs_dir: Path) -> bool:
    """Whether a name of the run, or its path in any notation, begins with ``word``."""
    path = entry.what.path
    relative = [str(path.relative_to(outputs_dir.absolute()))] if path.is_relative_to(outputs_dir.absolute()) else []
    texts = (*entry.names, path.name, str(path), terminal.nearest(path), *relative)
    return any(text.startswith(word) for text in texts)


def _runs_of_sweep(sweep: SweepDir) -> list[str]:
    """One line per run: folder, label, and loss or status; the best run first, with a mark."""
    rows: list[tuple[float, str, str, str]] = []
    for rundir in runs_of(sweep):
        with contextlib.suppress(*DAMAGED):
            state, manifest = rundir.read_state(), rundir.read_manifest()
            loss = state.summary.get("eval/loss") if state.status == "completed" else None
            cost = float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf
            result = f"loss {cost:.4f}" if math.isfinite(cost) else state.status
            label = str(manifest.get("label") or manifest.get("name") or "")
            rows.append((cost, terminal.nearest(rundir.path), label, result))
    best = min(rows, default=None)
    rows.sort(key=lambda row: row is not best)
    labels = terminal.distinct_names([label for _, _, label, _ in rows], WIDEST)
    marks = [" ★ the best" if row is best and math.isfinite(row[0]) else "" for row in rows]
    parts = zip(rows, labels, marks, strict=True)
    return [f"{folder}  ({label}, {result}){mark}" for (_, folder, _, result), label, mark in parts]


def _listed(entries: Iterable[_Entry]) -> str:
    """One line per entry, newest first, at most ``SHOWN``."""
    entries = sorted(entries, key=lambda entry: entry.created, reverse=True)
    names = terminal.distinct_names([entry.names[0] for entry in entries[:SHOWN]], WIDEST)
    return _lines([entry.line(name) for entry, name in zip(entries, names, strict=False)], len(entries))


def _lines(lines: Sequence[str], count: int = 0) -> str:
    """The lines as an indented list, at most ``SHOWN``; ``count``: number of items if ``lines`` contains only some."""
    count = max(count, len(lines))
    more = [f"… and {count - SHOWN} more"] if count > SHOWN else []
    return "".join(f"\n      {line}" for line in [*lines[:SHOWN], *more])
