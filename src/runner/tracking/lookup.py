"""RUN as people write it: a folder, an MLflow run id, a Slurm job id, the name of a run or of a sweep.

Every manifest below the outputs folder is read once; a damaged one is left out, and that is said.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import terminal
from runner.errors import ConfigError, Fault, suggest
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir, sweep_of

SHORTEST_ID = 4
"""Characters of an MLflow run id: fewer are more likely a name that was cut short."""
SHOWN, WIDEST = 8, 48
"""Lines that a message lists, and characters of a name in them."""
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading the files of a run folder raises that a crash, a disk or a person has spoilt."""
log = logging.getLogger("runner")


def resolve(word: str, outputs_dir: Path) -> RunDir | SweepDir:
    """The run or the sweep that ``word`` means.

    A folder counts from the current directory or from ``outputs_dir``, or its own name alone; an MLflow id may be cut
    to a unique prefix; a job of a sweep is also SWEEP/LABEL, and a part of a label (``quant=4bit,lora.r=8``) will do.

    Raises:
        ConfigError: there is none (with the nearest names), or there are several (with all of them).
    """
    if folder := _folder(word, outputs_dir):
        return folder
    entries = list(_entries(outputs_dir))
    found = _sweeps_over_their_runs([entry for entry in entries if word in entry.names])
    found = found or [entry for entry in entries if word == entry.what.path.name]
    if not found and len(word) >= SHORTEST_ID:
        found = [entry for entry in entries if entry.mlflow_id.startswith(word)]
    found = found or [entry for entry in entries if any(_says(name, word) for name in entry.names)]
    if len(found) == 1:
        return found[0].what
    if found:
        remedy = f"name one of these folders:{_listed(_newest_first(found))}"
        raise ConfigError(Fault("", f"'{word}' is the name of {len(found)} runs", remedy))
    raise ConfigError(
        Fault("", f"there is no run or sweep '{word}' below {outputs_dir}", _nearest(word, entries, outputs_dir))
    )


def resolve_run(word: str, outputs_dir: Path) -> RunDir:
    """The single run that ``word`` means.

    Raises:
        ConfigError: as ``resolve``, and for a sweep (with its runs).
    """
    found = resolve(word, outputs_dir)
    if isinstance(found, RunDir):
        return found
    lines = _lines(_runs_of_sweep(found))
    raise ConfigError(Fault("", f"'{word}' is a sweep, and one run is wanted", f"name one of its runs:{lines}"))


def meant(word: str, outputs_dir: Path) -> list[tuple[RunDir | SweepDir, bool]]:
    """What a word means, and whether that is its name: a run or a sweep, or everything below a folder.

    Raises:
        ConfigError: as ``resolve``.
    """
    try:
        return [(resolve(word, outputs_dir), True)]
    except ConfigError:
        folders = [path for path in (Path(word).expanduser(), outputs_dir / word) if path.is_dir()]
        below = [(what, False) for path in folders[:1] for what in scan(path.resolve())]
        if not below:
            raise
        return below


def scan(folder: Path) -> Iterator[RunDir | SweepDir]:
    """The run or sweep that ``folder`` is, or all of those below it; those of a sweep count as one.

    Only names of files are looked at, and nothing below a run or a sweep.
    """
    for place, below, files in os.walk(folder.absolute()):
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "mlartifacts")
        if "sweep.json" in files:
            below.clear()
            yield SweepDir(Path(place))
        elif "state.json" in files or "manifest.json" in files:
            below.clear()
            yield RunDir(Path(place))


def runs_of(sweep: SweepDir) -> list[RunDir]:
    """The runs of a sweep; none, and a warning, where sweep.json cannot be read."""
    try:
        return sweep.rundirs()
    except DAMAGED as error:
        say_damaged(sweep.path, error)
        return []


def say_damaged(folder: Path, error: Exception) -> None:
    """Warn of a folder that is left out."""
    log.warning(f"left out, its files cannot be read: {folder} ({type(error).__name__}: {error})")


@dataclass(frozen=True)
class _Entry:
    """A run or a sweep and what it may be called."""

    what: RunDir | SweepDir
    names: tuple[str, ...]
    mlflow_id: str
    created: float

    def line(self, name: str) -> str:
        made = time.strftime("%F %T", time.localtime(self.created)) if self.created else ""
        kind = "sweep" if isinstance(self.what, SweepDir) else "run"
        return f"{terminal.nearest(self.what.path)}  ({kind} {name}{', made ' + made if made else ''})"


def _entries(outputs_dir: Path) -> Iterator[_Entry]:
    for found in scan(outputs_dir):
        if isinstance(found, SweepDir):
            yield from _of_sweep(found)
        else:
            yield from _of_run(found)


def _of_sweep(sweep: SweepDir) -> Iterator[_Entry]:
    try:
        said = sweep.read()
        mlflow_id = str((said.get("mlflow") or {}).get("parent_run_id") or "")
        name = str(said.get("name") or sweep.path.name)
        yield _Entry(sweep, (name, sweep.path.name), mlflow_id, float(said.get("created") or 0))
        rundirs = sweep.rundirs()
    except DAMAGED as error:
        return say_damaged(sweep.path, error)
    for rundir in rundirs:
        yield from _of_run(rundir, name)


def _of_run(rundir: RunDir, sweep: str = "") -> Iterator[_Entry]:
    try:
        said: dict[str, Any] = rundir.read_manifest()
        own = [said.get("label"), said.get("name"), rundir.path.name if sweep else None]
        names = [str(name) for name in own if name]
        names += [f"{sweep}/{name}" for name in names if sweep]
        names += [str(job) for job in [(said.get("slurm") or {}).get("job_id")] if job]
        mlflow_id = str((said.get("mlflow") or {}).get("run_id") or "")
        yield _Entry(rundir, tuple(names) or (rundir.path.name,), mlflow_id, float(said.get("created") or 0))
    except DAMAGED as error:
        say_damaged(rundir.path, error)


def _folder(word: str, outputs_dir: Path) -> RunDir | SweepDir | None:
    for path in (Path(word).expanduser().absolute(), outputs_dir.absolute() / word):
        if (path / "sweep.json").exists():
            return SweepDir(path.resolve())
        if (path / "state.json").exists() or (path / "manifest.json").exists():
            return RunDir(path.resolve())
    return None


def _says(name: str, word: str) -> bool:
    """Whether all parts of ``word`` are among those of ``name``, both with the same sweep before them, or none."""
    (sweep, _, label), (wanted, _, parts) = name.rpartition("/"), word.rpartition("/")
    return sweep == wanted and set(parts.split(",")) <= set(label.split(","))


def _sweeps_over_their_runs(found: list[_Entry]) -> list[_Entry]:
    """A sweep named like its runs is the sweep."""
    sweeps = {entry.what.path for entry in found if isinstance(entry.what, SweepDir)}
    return [entry for entry in found if isinstance(entry.what, SweepDir) or not _is_in(entry.what, sweeps)]


def _is_in(rundir: RunDir, sweeps: set[Path]) -> bool:
    sweep = sweep_of(rundir)
    return sweep is not None and sweep.path in sweeps


def _nearest(word: str, entries: list[_Entry], outputs_dir: Path) -> str:
    if not entries:
        return "outputs_dir=FOLDER names another folder of runs"
    if begun := [entry for entry in entries if _begins(entry, word, outputs_dir)]:
        return f"{len(begun)} {'begins' if len(begun) == 1 else 'begin'} so:{_listed(_newest_first(begun))}"
    if len(word) < SHORTEST_ID and (alike := [entry for entry in entries if entry.mlflow_id.startswith(word)]):
        few = f"an MLflow run id is written with {SHORTEST_ID} characters or more"
        return f"{few}; those that begin so:{_listed(_newest_first(alike))}"
    if holding := [entry for entry in entries if any(word.lower() in name.lower() for name in entry.names)]:
        has = "has that in its name" if len(holding) == 1 else "have that in their names"
        return f"{len(holding)} {has}:{_listed(_newest_first(holding))}"
    names = {name for entry in entries for name in (*entry.names, terminal.nearest(entry.what.path))}
    if hint := suggest(word, names) or suggest(word, {part for name in names for part in name.split(",")}):
        return hint
    latest = _listed(_newest_first(entries))
    form = f"a folder, a name or the beginning of an MLflow run id ({SHORTEST_ID} characters or more)"
    return f"RUN is {form}; the latest:{latest}"


def _begins(entry: _Entry, word: str, outputs_dir: Path) -> bool:
    """Whether a name of a run, or its folder as one writes it, begins so."""
    path = entry.what.path
    below = [str(path.relative_to(outputs_dir.absolute()))] if path.is_relative_to(outputs_dir.absolute()) else []
    written = (*entry.names, path.name, str(path), terminal.nearest(path), *below)
    return any(text.startswith(word) for text in written)


def _runs_of_sweep(sweep: SweepDir) -> list[str]:
    """A line for each run: its folder, what it is called and how it stands; the best, which is marked, first."""
    found: list[tuple[float, str, str, str]] = []
    for rundir in runs_of(sweep):
        with contextlib.suppress(*DAMAGED):
            state, said = rundir.read_state(), rundir.read_manifest()
            loss = state.summary.get("eval/loss") if state.status == "completed" else None
            cost = float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf
            how = f"loss {cost:.4f}" if math.isfinite(cost) else state.status
            found.append((cost, terminal.nearest(rundir.path), str(said.get("label") or said.get("name") or ""), how))
    best = min(found, default=None)
    found.sort(key=lambda each: each is not best)
    labels = terminal.told_apart([label for _, _, label, _ in found], WIDEST)
    marks = [" ★ the best" if each is best and math.isfinite(each[0]) else "" for each in found]
    rows = zip(found, labels, marks, strict=True)
    return [f"{folder}  ({label}, {how}){mark}" for (_, folder, _, how), label, mark in rows]


def _newest_first(entries: Iterable[_Entry]) -> list[_Entry]:
    return sorted(entries, key=lambda entry: entry.created, reverse=True)


def _listed(entries: Sequence[_Entry]) -> str:
    names = terminal.told_apart([entry.names[0] for entry in entries[:SHOWN]], WIDEST)
    return _lines([entry.line(name) for entry, name in zip(entries, names, strict=False)], len(entries))


def _lines(lines: Sequence[str], count: int = 0) -> str:
    """One below the other; ``count``: of so many."""
    count = max(count, len(lines))
    more = [f"… and {count - SHOWN} more"] if count > SHOWN else []
    return "".join(f"\n      {line}" for line in [*lines[:SHOWN], *more])
