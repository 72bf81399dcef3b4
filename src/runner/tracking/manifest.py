"""From a checked configuration to a run folder that says everything a worker needs, and who the run is."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from runner.config import bind, moved, user_code
from runner.config.choices import of_overrides
from runner.errors import Fault, ResumeError
from runner.files import write_atomic
from runner.secrets import redact, take_credentials
from runner.tracking import checkout, provenance
from runner.tracking.rundir import UNFINISHED, RunDir

RUN_TIME_KEYS = ("name", "outputs_dir", "sweep", "resume", "retry", "tracking", "launcher", "search")
"""Keys that say where and how a run happens, not what it computes: they do not change its identity."""

BEFORE_THE_MANIFEST = {".hydra", "code", "config.yaml", "state.json", "dirty.diff", ".manifest.lock"}
"""What a run that was killed while it was being prepared leaves behind."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same as ``safe_load``, seven times as fast: a sweep may have a thousand configurations."""


def signature(cfg: Mapping[str, Any]) -> str:
    """The identity of a run: 16 hexadecimal digits over all keys that change what is computed."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that change what is computed, with the option names of version 0.1.0."""
    what = {key: value for key, value in cfg.items() if key not in RUN_TIME_KEYS}
    if what.get(user_code.KEY) is None:
        what.pop(user_code.KEY, None)  # version 0.1.0 had no such key
    return moved.to_first(user_code.detached(what))


def freeze(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with local paths made absolute: what is written down and handed over."""
    frozen = json.loads(json.dumps(cfg))
    frozen["outputs_dir"] = os.path.abspath(os.path.expanduser(cfg["outputs_dir"]))
    for group, key in (("data", "path"), ("data", "eval_path"), ("model", "path")):
        value = frozen[group].get(key)
        if isinstance(value, str) and (os.path.exists(os.path.expanduser(value)) or glob.glob(value)):
            frozen[group][key] = os.path.abspath(os.path.expanduser(value))
    return dict(frozen)


def keep_credentials(cfg: dict[str, Any]) -> None:
    """Move a user name and password from the tracking URI into this process's environment, where workers find them.

    They must not stand in any file of the run, and a worker knows its run folder and its environment alone.
    """
    uri = cfg["tracking"].get("uri")
    if uri:
        cfg["tracking"]["uri"], user, password = take_credentials(uri)
        for name, value in (("MLFLOW_TRACKING_USERNAME", user), ("MLFLOW_TRACKING_PASSWORD", password)):
            if value:
                os.environ[name] = value


def prepare(
    cfg: Mapping[str, Any],
    folder: Path,
    command: list[str],
    overrides: list[str],
    made: list[Path] | None = None,
    **notes: Any,
) -> RunDir:
    """Write the frozen configuration, the state ``pending`` and, last, the manifest into ``folder``.

    A folder that holds a run of the same signature is left as it is, for a worker to take up. ``made`` are the folders
    that were made for this run: they go again should it be refused. ``notes`` are added to the manifest.

    Raises:
        ResumeError: the folder holds a run of another signature.
    """
    rundir = RunDir(folder)
    refuse_other(rundir, cfg)
    if not rundir.manifest.exists():
        user_code.copy(user_code.paths_of(cfg), rundir.code)
        _write_config(rundir, cfg)
        rundir.write_state(status="pending")
        manifest = _manifest(cfg, rundir, command, overrides)
        rundir.update_manifest(**{**manifest, "made_folders": [str(path) for path in made or []], **notes})
    return rundir


def refuse_other(rundir: RunDir, cfg: Mapping[str, Any]) -> None:
    """Refuse a folder that holds a run of another configuration."""
    found, name = rundir.read_manifest().get("signature"), signature(cfg)
    if found and found != name:
        raise ResumeError(
            Fault(
                "hydra.run.dir",
                f"holds a run of another configuration (signature {found}, this one is {name})",
                "name another folder, or compare the two config.yaml",
                rundir.path,
            )
        )


def refuse_files(folder: Path) -> None:
    """Refuse a folder that holds files, but no run.

    Raises:
        ResumeError: with what to do instead.
    """
    if RunDir(folder).manifest.exists() or not folder.is_dir():
        return
    if {path.name for path in folder.iterdir()} - BEFORE_THE_MANIFEST:
        remedy = "name an empty folder, or the folder of a run"
        raise ResumeError(Fault("hydra.run.dir", "holds other files and no run", remedy, folder))


def read_config(rundir: RunDir) -> dict[str, Any]:
    """The frozen configuration of a run folder.

    Raises:
        ResumeError: there is none, or it cannot be read.
    """
    try:
        cfg = moved.to_today(_frozen(rundir))
        user_code.attach_copy(cfg, rundir.code)
        return cfg
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        problem = f"is not a run folder: config.yaml cannot be read ({error})"
        raise ResumeError(Fault("", f"{rundir.path} {problem}", "name the folder of a run")) from error


def is_of_first(rundir: RunDir) -> bool:
    """Whether version 0.1.0 froze the configuration of this folder."""
    return moved.is_of_first(_frozen(rundir))


def write_for_first(rundir: RunDir) -> None:
    """Write the configuration of this folder as version 0.1.0 reads it, whose code will train it."""
    _write_config(rundir, moved.to_first(_frozen(rundir)))


def _frozen(rundir: RunDir) -> dict[str, Any]:
    """config.yaml as it is."""
    return dict(yaml.load(rundir.config.read_text(), Loader=_LOADER))


def _write_config(rundir: RunDir, cfg: Mapping[str, Any]) -> None:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast: a sweep writes a thousand of these
    write_atomic(rundir.config, yaml.dump(user_code.detached(cfg), Dumper=dumper, sort_keys=False, allow_unicode=True))


def pinned(cfg: dict[str, Any], rundir: RunDir) -> dict[str, Any]:
    """The configuration with what the first attempt found: commits of the Hub, as a branch may move meanwhile, and how
    many rows fit, as sums in another order would be another run.
    """
    manifest = rundir.read_manifest()
    found = {group: (manifest.get(group) or {}).get("revision") for group in ("model", "data")}
    named = {group: revision for group, revision in found.items() if revision and "revision" in cfg[group]}
    settled = {group: {**cfg[group], "revision": revision} for group, revision in named.items()}
    train, rows = cfg["train"], manifest.get("micro_batch_size")
    if train["micro_batch_size"] == "auto" and rows and train["per_device_batch_size"] % rows == 0:
        settled["train"] = {**train, "micro_batch_size": rows}
    return {**cfg, **settled}


def choices(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Group → option of a run."""
    overrides = [str(override) for override in manifest.get("overrides") or []]
    return dict(manifest["choices"]) if "choices" in manifest else of_overrides(overrides)


def find_twin(outputs_dir: Path, name: str) -> RunDir | None:
    """The latest unfinished run with this signature below ``outputs_dir``, if any."""
    twins = []
    for manifest in outputs_dir.glob("*/*/manifest.json"):
        rundir = RunDir(manifest.parent)
        try:
            state = rundir.read_state()
            if rundir.read_manifest().get("signature") == name and state.status in UNFINISHED:
                twins.append((state.updated, str(rundir.path), rundir))
        except (OSError, ValueError, TypeError):
            continue  # a damaged folder is no twin
    return max(twins)[2] if twins else None


def _manifest(cfg: Mapping[str, Any], rundir: RunDir, command: list[str], overrides: list[str]) -> dict[str, Any]:
    git, patch = checkout.note(checkout.current())
    if patch:
        write_atomic(rundir.dirty_diff, patch.encode("utf-8", "surrogateescape"))
    return {
        "id": uuid.uuid4().hex,
        "signature": signature(cfg),
        "name": cfg["name"] or _default_name(overrides),
        **({"code": {path.name: str(path) for path in paths}} if (paths := user_code.paths_of(cfg)) else {}),
        "tracking": bind.bind(cfg["tracking"], "tracking")().kind,
        "created": time.time(),
        "command": [redact(word) for word in command],
        "overrides": [redact(override) for override in overrides],
        "git": git,
        "code_sha256": provenance.code_digest(),
        "versions": provenance.versions(),
        "lock_sha256": provenance.lock_digest(),
        "hardware": provenance.machine(),
    }


def _default_name(overrides: list[str]) -> str:
    named = [
        o for o in overrides if not o.startswith(("hydra.", "outputs_dir=", "tracking", "resume=", "train.sample"))
    ]
    return redact(",".join(named))[:120] or "defaults"
