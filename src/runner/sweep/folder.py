"""The folder of a sweep: which runs it has, where they lie, and what is to be done with each.

Runs are told apart by signature, never by number: the same command finds what is there, one with more values adds
to it, and two commands on the same folder agree, as only one of them at a time reads and changes sweep.json.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runner.errors import Fault, ResumeError
from runner.files import locked, write_atomic
from runner.secrets import redact
from runner.tracking.manifest import refuse_files, refuse_other, signature
from runner.tracking.rundir import DONE, RunDir
from runner.tracking.sweepdir import SweepDir

OTHERS = {".sweep.lock", ".search.lock", "search.journal", "multirun.yaml"}
"""What may lie in the folder before sweep.json does: ours, and what another sweeper of Hydra's wrote."""


@dataclass
class Wanted:
    """A job that a command asks for."""

    cfg: dict[str, Any]
    label: str
    """What tells it from the others: ``quant=4bit,lora.r=8``."""
    folder: str
    """Where it has to lie; "" where we choose."""

    @property
    def signature(self) -> str:
        return signature(self.cfg)


@contextlib.contextmanager
def joined(sweep: SweepDir, name: str, command: list[str], wanted: list[Wanted]) -> Iterator[list[RunDir]]:
    """Make the sweep, or add to it, and give each job its folder; nobody else changes the sweep during the block.

    The runs that the block makes there are removed, and sweep.json is as it was, if it raises anything.

    Raises:
        ResumeError: the folder, or one that a job is to have, holds something else; nothing was written.
    """
    refuse(sweep)
    missing = [path for path in (sweep.path, *sweep.path.parents) if not path.exists()]
    try:
        with locked(sweep.lock):
            try:
                yield from _joined(sweep, name, command, wanted)
            except BaseException:
                if sweep.path in missing and not sweep.manifest.exists():
                    with contextlib.suppress(OSError):
                        sweep.lock.unlink()  # while it is held: who waits for it, or comes, sees that it is gone
                raise
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it
                folder.rmdir()
        raise


def _joined(sweep: SweepDir, name: str, command: list[str], wanted: list[Wanted]) -> Iterator[list[RunDir]]:
    before = sweep.manifest.read_bytes() if sweep.manifest.exists() else b""
    manifest, rundirs = _with(sweep.read(), sweep, name, command, wanted)
    new = [rundir for rundir in rundirs if not rundir.manifest.exists()]
    try:
        write_atomic(sweep.manifest, json.dumps(manifest, indent=1))
        yield rundirs
    except BaseException:  # a full disk: as if this command had not been given
        _take_back(sweep, before, new)
        raise


def _with(
    manifest: dict[str, Any], sweep: SweepDir, name: str, command: list[str], wanted: list[Wanted]
) -> tuple[dict[str, Any], list[RunDir]]:
    """sweep.json with these jobs in it, and the folder of each; nothing is written."""
    manifest = manifest or {"id": uuid.uuid4().hex, "name": name, "created": time.time(), "jobs": {}}
    command = [redact(word) for word in command]
    if manifest.setdefault("commands", [])[-1:] != [command]:
        manifest["commands"].append(command)
    jobs = manifest["jobs"]
    for job in wanted:
        if job.signature not in jobs:
            folder = job.folder or f"{len(jobs):03d}-{job.signature[:8]}"
            jobs[job.signature] = {"folder": folder, "label": job.label}
    _refuse_shared([job["folder"] for job in jobs.values()])
    rundirs = [RunDir(sweep.path / jobs[job.signature]["folder"]) for job in wanted]
    for rundir, job in zip(rundirs, wanted, strict=True):
        refuse_files(rundir.path)
        refuse_other(rundir, job.cfg)
    return manifest, rundirs


def _take_back(sweep: SweepDir, before: bytes, new: list[RunDir]) -> None:
    """Remove the runs that this command made, whole ones too, and give sweep.json its earlier content.

    What cannot be removed stays: what stopped the command is said.
    """
    stays = False
    for rundir in new:
        try:
            if rundir.manifest.exists():
                rundir.discard()
        except OSError:
            stays = True
    with contextlib.suppress(OSError):  # it lists runs that are not there then: the same command makes them
        if before:
            write_atomic(sweep.manifest, before)
        elif not stays:
            sweep.manifest.unlink(missing_ok=True)


def refuse(sweep: SweepDir) -> None:
    """Refuse a folder that holds other things than a sweep.

    Raises:
        ResumeError: with what to do instead.
    """
    path, names = sweep.path, set[str]()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(f".{sweep.manifest.name}.")}
    if names - OTHERS and not sweep.manifest.exists():  # asked last: another command may be making it
        remedy = "name another folder with sweep=NAME or hydra.sweep.dir=…"
        raise ResumeError(Fault("sweep", "its folder holds other files and no sweep", remedy, path))


def _refuse_shared(names: list[str]) -> None:
    if shared := [name for name, count in Counter(names).items() if count > 1]:
        problem, remedy = "is the folder of more than one run", "let it hold what is swept, or leave it out"
        raise ResumeError(*(Fault("hydra.sweep.subdir", problem, remedy, name) for name in shared))


def has_to_work(rundir: RunDir, retry: bool) -> bool:
    """Whether the run still needs a worker: not if it is done or given up, nor if it failed and is not retried."""
    status = rundir.read_state().status
    return status not in DONE and (status != "failed" or retry)
