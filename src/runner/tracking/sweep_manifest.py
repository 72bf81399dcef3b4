"""The contents of sweep.json: rebuilt from the runs, if the file and its copy are lost; and the swept keys in it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import DamagedError
from runner.files import copy_of
from runner.tracking.rundir import RunDir


def of_runs(folder: Path) -> dict[str, Any]:
    """The contents of sweep.json by the manifests of the runs below ``folder``; empty if none records a sweep.

    It lacks the id by which MLflow's parent run is found: ``is_rebuilt`` says so, and ``mlflow`` has the run itself.
    Runs whose manifest is lost, too, are left out.
    """
    manifests = dict(_manifests(folder))
    names = Counter(str(manifest["sweep"]) for manifest in manifests.values())
    if not names:
        return {}
    name, _ = names.most_common(1)[0]
    found = {path: manifest for path, manifest in manifests.items() if manifest["sweep"] == name}
    by_age = sorted(found.values(), key=lambda manifest: float(manifest.get("created") or 0))
    commands = [manifest["command"] for manifest in by_age if manifest.get("command")]
    stored = [manifest["mlflow"] for manifest in by_age if (manifest.get("mlflow") or {}).get("parent_run_id")]
    parents = [{"parent_run_id": each["parent_run_id"], "uri": each.get("uri")} for each in stored]
    return {
        "id": uuid.uuid4().hex,
        "name": name,
        "created": float(by_age[0].get("created") or 0),
        "commands": [command for number, command in enumerate(commands) if command not in commands[:number]],
        "jobs": {
            str(manifest["signature"]): {"folder": os.path.relpath(path, folder), "label": manifest.get("label") or ""}
            for path, manifest in found.items()
        },
        "is_rebuilt": True,
        **({"mlflow": parents[-1]} if parents else {}),
    }


def swept(manifest: dict[str, Any]) -> dict[str, str]:
    """The swept keys with their values, as in the command (``8,16``, ``interval(1e-5,1e-2)``) or in the labels."""
    values: dict[str, dict[str, None]] = {}
    for job in manifest.get("jobs", {}).values():
        for part in re.split(r",(?=[\w./@+~]+=)", str(job.get("label") or "")):
            key, is_override, value = part.partition("=")
            if is_override:
                values.setdefault(key.lstrip("+"), {})[value] = None
    command = (manifest.get("commands") or [[]])[-1]
    words = shlex.split(command) if isinstance(command, str) else command
    given = {key.lstrip("+"): value for key, _, value in (str(word).partition("=") for word in words)}
    return {key: given.get(key) or ", ".join(texts) for key, texts in values.items()}


def _manifests(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(run folder, manifest) of the runs of sweeps, in the order of the numbers that begin their names."""
    for path, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        rundir = RunDir(Path(path))
        if {rundir.manifest.name, copy_of(rundir.manifest).name} & {*files}:
            subfolders.clear()
            with contextlib.suppress(DamagedError):
                if (manifest := rundir.read_manifest()).get("sweep") and manifest.get("signature"):
                    yield rundir.path, manifest
