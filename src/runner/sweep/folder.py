"""The folder of a sweep and its sweep.json: create run folders, add jobs, find existing ones.

Runs are identified by signature, not by number: the same command finds its runs, and a command with more values adds
runs. Concurrent commands read and change sweep.json one after the other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import Fault, ResumeError
from runner.files import copy_of, locked, write_kept
from runner.secrets import redact
from runner.tracking import recovery
from runner.tracking.manifest import refuse_files, refuse_other, signature
from runner.tracking.resume import rebuild
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DONE
from runner.tracking.sweepdir import SweepDir, refuse_inside

OTHERS = {".sweep.lock", ".search.lock", "search.journal", "multirun.yaml"}
"""Files that may exist in the folder before sweep.json: ours, and those of other Hydra sweepers."""


@dataclass
class SweepJob:
    """A job of a sweep command."""

    cfg: dict[str, Any]
    label: str
    """The swept values: ``quant=4bit,lora.r=8``."""
    folder: str
    """Folder name required by the configuration; "": we choose."""

    @functools.cached_property
    def signature(self) -> str:
        """Of the configuration, which no longer changes."""
        return signature(self.cfg)


@contextlib.contextmanager
def adding(sweep: SweepDir, name: str, command: list[str], jobs: list[SweepJob]) -> Iterator[list[RunDir]]:
    """Create the sweep or add jobs to it; yields the folder of each job. The sweep is locked during the block.

    If the block raises, the new runs are removed and sweep.json gets its earlier content.

    Raises:
        ResumeError: the sweep's folder or a run's folder contains something else; nothing was written.
    """
    refuse(sweep)
    missing = [path for path in (sweep.path, *sweep.path.parents) if not path.exists()]
    try:
        with locked(sweep.lock):
            try:
                yield from _adding(sweep, name, command, jobs)
            except BaseException:
                if sweep.path in missing and not sweep.manifest.exists():
                    with contextlib.suppress(OSError):
                        sweep.lock.unlink()  # while locked: waiting processes detect that the file is gone
                raise
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: used by another process
                folder.rmdir()
        raise


def _adding(sweep: SweepDir, name: str, command: list[str], jobs: list[SweepJob]) -> Iterator[list[RunDir]]:
    before = sweep.read(is_locked=True)
    manifest, rundirs = _with(copy.deepcopy(before), sweep, name, command, jobs)
    new = [rundir for rundir in rundirs if not rundir.manifest.exists()]
    try:
        write_kept(sweep.manifest, manifest)
        yield rundirs
    except BaseException:  # a full disk, for example: undo everything
        _undo(sweep, before, new)
        raise


def _with(
    manifest: dict[str, Any], sweep: SweepDir, name: str, command: list[str], jobs: list[SweepJob]
) -> tuple[dict[str, Any], list[RunDir]]:
    """sweep.json with these jobs added, and the folder of each job; nothing is written."""
    manifest = manifest or {"id": uuid.uuid4().hex, "name": name, "created": time.time(), "jobs": {}}
    command = [redact(word) for word in command]
    if manifest.setdefault("commands", [])[-1:] != [command]:
        manifest["commands"].append(command)
    known = manifest["jobs"]
    for job in jobs:
        if job.signature not in known:
            default = f"{len(known):03d}-{job.signature[:8]}"
            folder = os.path.relpath(sweep.path / job.folder, sweep.path) if job.folder else default
            known[job.signature] = {"folder": folder, "label": job.label}
    _refuse_folders(sweep, [entry["folder"] for entry in known.values()])
    rundirs = [RunDir(sweep.path / known[job.signature]["folder"]) for job in jobs]
    for rundir, job in zip(rundirs, jobs, strict=True):
        refuse_files(rundir.path)
        refuse_other(rundir, job.cfg)
        rebuild(rundir)
    return manifest, rundirs


def _undo(sweep: SweepDir, before: dict[str, Any], new: list[RunDir]) -> None:
    """Remove the runs that this command created, and restore sweep.json. Errors here are ignored: the first error is
    reported.
    """
    is_removed = True
    for rundir in new:
        try:
            if rundir.manifest.exists():
                recovery.discard(rundir)
        except OSError:
            is_removed = False
    with contextlib.suppress(OSError):  # sweep.json then lists missing runs: the same command creates them
        if before:
            write_kept(sweep.manifest, before)
        elif is_removed:
            copy_of(sweep.manifest).unlink(missing_ok=True)
            sweep.manifest.unlink(missing_ok=True)


def refuse(sweep: SweepDir) -> None:
    """Refuse a folder that contains other files and no sweep.

    Raises:
        ResumeError: the folder is in use.
    """
    sweep.restore()
    if not sweep.manifest.exists():
        refuse_inside(sweep.path, "sweep")
    path, names = sweep.path, set[str]()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = {entry.name for entry in path.iterdir() if f".{sweep.manifest.name}" not in entry.name}
    if names - OTHERS and not sweep.manifest.exists():  # checked last: another command may be creating it
        remedy = "choose another folder with sweep=NAME or hydra.sweep.dir=…"
        raise ResumeError(Fault("sweep", "this folder contains other files and no sweep", remedy, path))


def _refuse_folders(sweep: SweepDir, names: list[str]) -> None:
    """Refuse run folders that several runs share, that lie inside each other, or that are not inside the sweep's."""
    paths = [Path(os.path.normpath(sweep.path.absolute() / name)) for name in names]
    outside = [name for name, path in zip(names, paths, strict=True) if sweep.path.absolute() not in path.parents]
    known = {*paths}
    nested = [name for name, path in zip(names, paths, strict=True) if not known.isdisjoint(path.parents)]
    for problem, refused in (("is outside of the sweep's folder", outside), ("is inside another run's folder", nested)):
        if refused:
            remedy = "change it, or remove it"
            raise ResumeError(*(Fault("hydra.sweep.subdir", problem, remedy, name) for name in refused))
    if shared := [name for name, count in Counter(names).items() if count > 1]:
        problem, remedy = "is the folder of more than one run", "include the swept keys in it, or remove it"
        raise ResumeError(*(Fault("hydra.sweep.subdir", problem, remedy, name) for name in shared))


def needs_worker(rundir: RunDir, retry: bool) -> bool:
    """Whether the run needs a worker: it is not completed or pruned, and not failed unless ``retry``."""
    status = rundir.read_state().status
    return status not in DONE and (status != "failed" or retry)
