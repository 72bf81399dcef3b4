"""Prepare a run folder: config.yaml, manifest.json and the signature of the configuration."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from runner.config import code_files, data_nodes, moved, pinned_weights, shared_yaml, user_code
from runner.config.choices import of_overrides
from runner.errors import Fault, ResumeError
from runner.files import user_path, write_atomic
from runner.secrets import redact_all, take_credentials
from runner.tracking import checkout, origin, provenance, recovery, webhook
from runner.tracking.naming import default_name
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import UNFINISHED

RUN_TIME_KEYS = ("name", "outputs_dir", "sweep", "resume", "retry", "tracking", "launcher", "search")
"""Keys that do not change what a run computes, only where and how it runs: not part of its signature."""

BEFORE_THE_MANIFEST = {
    ".hydra", "code", "start", "config.yaml", "state.json", "dirty.diff", ".manifest.lock", ".manifest.json",
}  # fmt: skip
"""Files left by a run that was killed while it was prepared."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Same result as ``safe_load``, seven times as fast: a sweep may have a thousand configurations."""
_NEXT_GROUP = re.compile(r"^(?=[^\s#-])", re.MULTILINE)
"""The start of a line with a key of the top level."""


def signature(cfg: Mapping[str, Any]) -> str:
    """Hash (16 hex digits) of all keys that change what is computed."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that change what is computed, with the option names of version 0.1.0."""
    what = {key: value for key, value in cfg.items() if key not in RUN_TIME_KEYS}
    if isinstance(data := what.get("data"), Mapping):
        what["data"] = {key: value for key, value in data.items() if key != "evals" or value}  # 0.1.0 had no such key
    if what.get(code_files.KEY) is None:
        what.pop(code_files.KEY, None)  # version 0.1.0 had no such key
    return moved.to_first(user_code.detached(pinned_weights.without_folders(what)))


def freeze(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for config.yaml, with absolute local paths."""
    frozen = json.loads(json.dumps(cfg))
    frozen["outputs_dir"] = os.path.abspath(user_path(cfg["outputs_dir"], "outputs_dir"))
    sets = [each for group in data_nodes.GROUPS for each in data_nodes.named(frozen["data"], group).values()]
    for node, key in [*((node, key) for node in (frozen["data"], *sets) for key in ("path", "eval_path")),
                      (frozen["model"], "path")]:  # fmt: skip
        value = node.get(key)
        if isinstance(value, str) and _is_local(path := os.path.expanduser(value)):
            node[key] = os.path.abspath(path)
    return dict(frozen)


def _is_local(path: str) -> bool:
    """Whether the path exists on this machine, or is a glob that matches a file; ``**``: any number of folders."""
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def keep_credentials(cfg: dict[str, Any]) -> None:
    """Move user name and password from the tracking URI, and the webhook, into the environment, which workers inherit.

    So no file of the run contains them.
    """
    node = cfg.get("tracking")
    if isinstance(node, Mapping) and isinstance(uri := node.get("uri"), str):
        cfg["tracking"]["uri"] = credentials_into_environment(uri)
    if isinstance(node, Mapping) and isinstance(url := node.get("webhook"), str) and webhook.hidden(url) != url:
        cfg["tracking"]["webhook"] = webhook.hidden(url)
        os.environ[webhook.VARIABLE] = url


def credentials_into_environment(uri: str) -> str:
    """Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the URI; returns the URI without them."""
    uri, user, password = take_credentials(uri)
    credentials = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    os.environ.update({name: value for name, value in credentials.items() if value})
    return uri


def create(
    cfg: Mapping[str, Any],
    folder: Path,
    command: list[str],
    overrides: list[str],
    made_folders: Sequence[Path] = (),
    **notes: Any,
) -> RunDir:
    """Write config.yaml, state.json (``pending``) and, last, manifest.json into ``folder``.

    A folder that contains a run with the same signature is not changed: a worker can continue it. ``made_folders``: the
    folders created for this run, removed if it is refused. ``notes`` are added to the manifest.

    Raises:
        ResumeError: the folder contains a run with another signature.
    """
    rundir = RunDir(folder)
    refuse_other(rundir, cfg)
    if not rundir.manifest.exists():
        code_files.copy(user_code.paths_of(cfg), rundir.code)
        origin.keep_start(cfg, rundir)
        _write_config(rundir, cfg)
        rundir.write_state(status="pending")
        manifest = _manifest(cfg, rundir, command, overrides)
        rundir.update_manifest(**{**manifest, "made_folders": [str(path) for path in made_folders], **notes})
    return rundir


def refuse_other(rundir: RunDir, cfg: Mapping[str, Any]) -> None:
    """Refuse a folder that contains a run with another configuration."""
    existing = rundir.read_manifest().get("signature")
    if existing and existing != (ours := signature(cfg)):
        raise ResumeError(
            Fault(
                "hydra.run.dir",
                f"contains a run with another configuration (its signature: {existing}, of this run: {ours})",
                "choose another folder, or compare the two config.yaml files",
                rundir.path,
            )
        )


def refuse_files(folder: Path) -> None:
    """Refuse a folder that contains files but no run.

    Raises:
        ResumeError: it does.
        DamagedError: its run has lost its manifest.json.
    """
    recovery.restore_manifest(RunDir(folder))
    if RunDir(folder).manifest.exists() or not folder.is_dir():
        return
    if {path.name for path in folder.iterdir()} - BEFORE_THE_MANIFEST:
        remedy = "name an empty folder, or the folder of a run"
        raise ResumeError(Fault("hydra.run.dir", "contains files but no run", remedy, folder))


def read_config(rundir: RunDir, *, shares: bool = False) -> dict[str, Any]:
    """The configuration in config.yaml of a run folder.

    ``shares``: it must not be changed, since the runs of a sweep share the groups that they have in common; faster.

    Raises:
        ResumeError: the file is missing or cannot be read.
    """
    try:
        if shares and not isinstance((cfg := _frozen(rundir, _today)).get(code_files.KEY), Mapping):
            return cfg
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


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_LOADER)


@functools.lru_cache(maxsize=1024)
def _today(text: str) -> Any:
    """A group with the names of today, without paths of the user's code."""
    group = _parsed(text)
    if isinstance(group, Mapping):
        group = moved.to_today(group)
        user_code.refuse_given(group)
    return group


def _frozen(rundir: RunDir, parsed: Callable[[str], Any] = _parsed) -> dict[str, Any]:
    """config.yaml as ``parsed`` reads it; the groups that the runs of a sweep have in common are parsed once."""
    text = rundir.config.read_text()
    try:
        groups = [parsed(group) for group in _NEXT_GROUP.split(text)]
    except yaml.YAMLError:  # an alias of another group
        groups = [parsed(text)]
    cfg = {key: value for group in groups if group is not None for key, value in dict(group).items()}
    if not cfg:
        raise ValueError("it is empty")
    return cfg


def _write_config(rundir: RunDir, cfg: Mapping[str, Any]) -> None:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast: a sweep writes a thousand of these
    write_atomic(rundir.config, shared_yaml.dump(user_code.detached(cfg), dumper))


def pinned(cfg: dict[str, Any], rundir: RunDir) -> dict[str, Any]:
    """The configuration with values fixed by the first attempt: Hub commits, micro-batch size, start adapter, classes.

    A Hub branch may move between attempts, and another micro-batch size changes the order of floating-point sums.
    """
    manifest = rundir.read_manifest()
    recorded = {group: (manifest.get(group) or {}).get("revision") for group in ("model", "data")}
    revisions = {group: revision for group, revision in recorded.items() if revision and "revision" in cfg[group]}
    fixed = {group: {**cfg[group], "revision": revision} for group, revision in revisions.items()}
    fixed["data"] = _with_revisions(fixed.get("data", cfg["data"]), manifest.get("data") or {})
    train, rows = cfg["train"], manifest.get("micro_batch_size")
    if train["micro_batch_size"] == "auto" and rows and train["per_device_batch_size"] % rows == 0:
        fixed["train"] = {**train, "micro_batch_size": rows}
    if settled := manifest.get("settled"):
        fixed["task"] = {**cfg["task"], **settled}
    if revision := (manifest.get("teacher") or {}).get("revision"):
        fixed["task"] = {**fixed.get("task", cfg["task"]), "teacher": f"{manifest['teacher']['path']}@{revision}"}
    return origin.started({**cfg, **fixed}, rundir)


def _with_revisions(data: dict[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The node ``data`` with the Hub commits of the data sets inside of it."""
    pinned = dict(data)
    for group in data_nodes.GROUPS:
        for name, node in data_nodes.named(data, group).items():
            revision = ((recorded.get(group) or {}).get(name) or {}).get("revision")
            if revision and "revision" in node:
                pinned[group] = {**pinned[group], name: {**node, "revision": revision}}
    return pinned


def choices(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Group → option of a run."""
    overrides = [str(override) for override in manifest.get("overrides") or []]
    return dict(manifest["choices"]) if "choices" in manifest else of_overrides(overrides)


def tracker(rundir: RunDir) -> str:
    """``mlflow`` or ``offline``: where the records of a run go."""
    if recorded := rundir.read_manifest().get("tracking"):
        return str(recorded)
    from runner.config import bind  # imports omegaconf

    return str(bind.bind(read_config(rundir)["tracking"], "tracking")().kind)  # 0.1.0 recorded none


def find_twin(outputs_dir: Path, signature: str) -> RunDir | None:
    """The latest unfinished run with this signature below ``outputs_dir``; None if there is none."""
    twins = []
    for manifest in outputs_dir.glob("*/*/manifest.json"):
        rundir = RunDir(manifest.parent)
        try:
            state = rundir.read_state()
            if rundir.read_manifest().get("signature") == signature and state.status in UNFINISHED:
                twins.append((state.updated, str(rundir.path), rundir))
        except (OSError, ValueError, TypeError):
            continue  # skip a damaged folder
    return max(twins)[2] if twins else None


def _manifest(cfg: Mapping[str, Any], rundir: RunDir, command: list[str], overrides: list[str]) -> dict[str, Any]:
    from runner.config import bind

    git, patch = checkout.note_of_current()
    if patch:
        write_atomic(rundir.dirty_diff, patch.encode("utf-8", "surrogateescape"))
    return {
        "id": uuid.uuid4().hex,
        "signature": signature(cfg),
        "name": cfg["name"] or default_name(overrides),
        **({"code": {path.name: str(path) for path in paths}} if (paths := user_code.paths_of(cfg)) else {}),
        **({origin.FIELD: chain} if (chain := origin.came_from(cfg)) else {}),
        "tracking": bind.bind(cfg["tracking"], "tracking")().kind,
        "created": time.time(),
        "command": redact_all(command),
        "overrides": redact_all(overrides),
        "git": git,
        "repositories": checkout.repositories(user_code.paths_of(cfg)),
        "code_sha256": provenance.code_digest(),
        "versions": provenance.versions(),
        "lock_sha256": provenance.lock_digest(),
        "hardware": provenance.machine(),
    }
