"""The runs whose weights a run starts from: its chain, SFT → DPO → …, and its own copy of the adapter it continues."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.config import pinned_weights
from runner.files import read_json, user_path, write_atomic
from runner.tracking import naming, provenance
from runner.tracking.rundir import RunDir

FIELD = "came_from"
"""Key of manifest.json: a list of entries as in ``entry``, the nearest run first."""
EXPORTED = "came_from.json"
"""The file with the same key in the folder of an exported model."""


def came_from(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chain of a new run: of ``lora.start``, else of a ``model.path`` in a run folder or one that ``export`` has
    written; empty without either."""
    if text := pinned_weights.of(cfg):
        return entry("lora.start", Path(pinned_weights.split(text)[0]))
    path = cfg["model"].get("path")
    if not isinstance(path, str):
        return []
    folder = user_path(path, "model.path")
    if folder.name == "model" and RunDir(folder.parent).manifest.exists():
        return entry("model.path", folder.parent)
    if not (folder / EXPORTED).is_file():
        return []
    remedy = "export the model again, or delete the file: where the model comes from is then not known"
    return list(read_json(folder / EXPORTED, remedy).get(FIELD) or [])


def note(folder: Path, run: Path) -> None:
    """Write the chain of a run with this exported model into its ``folder``."""
    write_atomic(folder / EXPORTED, json.dumps({FIELD: entry("model.path", run)}, indent=2) + "\n")


def entry(how: str, folder: Path) -> list[dict[str, Any]]:
    """The run in ``folder``, followed by the runs that it came from; ``how``: the key by which it was named.

    A folder without manifest.json (a plain adapter) gives an entry with ``how`` and ``where`` alone.
    """
    manifest = RunDir(folder).read_manifest()
    known = {
        "name": naming.label(manifest, folder),
        "id": manifest.get("id"),
        "mlflow_run_id": (manifest.get("mlflow") or {}).get("run_id"),
        "weights_sha256": manifest.get("weights_sha256"),
    }
    return [{"how": how, "where": str(folder), **known}, *(manifest.get(FIELD) or [])]


def chain(manifest: Mapping[str, Any]) -> str:
    """The chain as text, the nearest run first: ``dpo (3f2a91c0) ← sft (91c03f2a)``; empty without one."""
    return " ← ".join(_named(each) for each in manifest.get(FIELD) or [])


def nearest(manifest: Mapping[str, Any]) -> str | None:
    """The MLflow id, else our own id, of the run that this run came from."""
    chain = manifest.get(FIELD) or [{}]
    return chain[0].get("mlflow_run_id") or chain[0].get("id")


def teacher(manifest: Mapping[str, Any]) -> str:
    """The teacher of a distillation as text: ``sft (3f2a91c0)``; empty without one."""
    return _named(known) if (known := manifest.get("teacher")) else ""


def keep_start(cfg: Mapping[str, Any], rundir: RunDir) -> None:
    """Copy the adapter that ``lora.start`` names into the run folder: the run no longer needs the other one.

    Files are linked where that is possible: a sweep from one adapter holds its weights once.
    """
    if not (text := pinned_weights.of(cfg)):
        return
    source = pinned_weights.adapter_in(Path(pinned_weights.split(text)[0]))
    rundir.start.mkdir(parents=True, exist_ok=True)
    for name in (pinned_weights.ADAPTER, pinned_weights.WEIGHTS, pinned_weights.LOFTQ):
        (rundir.start / name).unlink(missing_ok=True)
        if name == pinned_weights.LOFTQ and not (source / name).is_file():
            continue
        try:
            os.link(source / name, rundir.start / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / name, rundir.start / name)


def started(cfg: Mapping[str, Any], rundir: RunDir) -> dict[str, Any]:
    """The configuration with ``lora.start`` in the run's own copy, if it has one."""
    text = pinned_weights.of(cfg)
    if not text or not (rundir.start / pinned_weights.ADAPTER).is_file():
        return dict(cfg)
    return pinned_weights.replaced(cfg, pinned_weights.joined(rundir.start, pinned_weights.split(text)[1]))


def is_there(text: str) -> bool:
    """Whether the adapter of a frozen ``lora.start`` is in its folder, unchanged."""
    folder, digest = pinned_weights.split(text)
    return digest_of(Path(folder)) == digest


def is_teacher_there(text: str) -> bool:
    """Whether the teacher of a frozen ``task.teacher`` is in its place, unchanged; on the Hub a revision is."""
    place, digest = pinned_weights.split(text)
    return not digest or digest_of_teacher(Path(place)) == digest


def digest_of_teacher(place: Path) -> str | None:
    """The hash of the weights of a run, of a model folder or of a GGUF file; None if there are none to be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return provenance.remembered_digest(RunDir(place).model if RunDir(place).manifest.exists() else place)
    return None


def digest_of(folder: Path) -> str | None:
    """The hash of the weights of the adapter in ``folder``; None if it has none that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return provenance.weights_digest(pinned_weights.adapter_in(folder))
    return None


def _named(each: Mapping[str, Any]) -> str:
    identity = str(each.get("mlflow_run_id") or each.get("id") or each.get("weights") or "")[:8]
    return f"{each.get('name')} ({identity})" if identity else str(each.get("name"))
