"""Choose the folder of a run: the folder the user named, the folder of the run to resume, or a new one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from runner import terminal
from runner.config import user_code
from runner.config.check import LIMITS
from runner.errors import ConfigError, Fault, ResumeError
from runner.files import user_path
from runner.tracking import lookup, manifest, recovery
from runner.tracking.rundir import RunDir

RESUME_KEYS = ("resume", "retry", "launcher")


def choose(cfg: dict[str, Any], composed: Path, *, named: bool, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """(folder, configuration) of a single run.

    Args:
        composed: the value of ``hydra.run.dir``.
        named: whether the user set ``hydra.run.dir``.

    Raises:
        ConfigError: no run for ``resume=RUN``.
        ResumeError: ``resume=RUN`` together with other overrides, or its config.yaml cannot be read.
    """
    if cfg["resume"] == "auto":
        return _twin_or_new(cfg, composed, named=named), cfg
    if cfg["resume"] is not None:
        if named:
            raise ResumeError(Fault("hydra.run.dir", "a resumed run stays in its folder", "omit it", composed))
        return folder_of(cfg), configuration(cfg, overrides)
    if named:
        return composed, cfg
    _mention_twin(cfg)
    return _unused(composed), cfg


def configuration(cfg: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The configuration of a run; with ``resume=RUN`` the one in its config.yaml, and overrides are refused."""
    if cfg["resume"] in (None, "auto"):
        return cfg
    rundir = RunDir(folder_of(cfg))
    frozen = {**manifest.read_config(rundir), "retry": cfg["retry"]}
    if others := [override for override in overrides if not is_kept(override, cfg, frozen)]:
        if all(other.partition("=")[0].removeprefix("train.") in LIMITS for other in others):
            problem = f"goes on to the end that the run began with, and cannot change it ({', '.join(others)})"
            this, later = terminal.typed(terminal.nearest(rundir.path), "resume"), " ".join(others)
            remedy = f"first let it end: python -m runner {this}, then train on: {this} {later}"
            raise ResumeError(Fault("resume", problem, remedy, cfg["resume"]))
        problem = f"uses the configuration of that run and cannot change {', '.join(others)}"
        remedy = "remove these overrides, or start a new run with them"
        raise ResumeError(Fault("resume", problem, remedy, cfg["resume"]))
    for name in user_code.edited(frozen, rundir.read_manifest().get("code") or {}):
        print(f"note: {name} was edited since this run began; the run continues with its own copy, {rundir.code}",
              file=sys.stderr)  # fmt: skip
    return frozen


def is_kept(override: str, cfg: dict[str, Any], frozen: dict[str, Any]) -> bool:
    """Whether the run has the value of the override already, or the override is allowed for any resumed run."""
    key = override.partition("=")[0].lstrip("+~")
    if key.partition(".")[0] in RESUME_KEYS:
        return True
    if key != "experiment" and not key.startswith("hydra"):
        ours, theirs = user_code.detached(cfg), user_code.detached(frozen)
        for part in key.replace("/", ".").split("."):
            ours, theirs = (node.get(part, ...) if isinstance(node, dict) else ... for node in (ours, theirs))
        return ours is not ... and bool(ours == theirs)
    return key == "experiment" and manifest.signature(cfg) == manifest.signature(frozen)


def refuse(folder: Path, cfg: dict[str, Any]) -> None:
    """Refuse a folder that this run may not use.

    Raises:
        ResumeError: other files in it, a run with another configuration, or a failed run (without ``retry=true``).
    """
    rundir = RunDir(folder)
    manifest.refuse_files(folder)
    if not rundir.manifest.exists():
        return
    manifest.refuse_other(rundir, cfg)
    rebuild(rundir)
    state = rundir.read_state()
    if state.status == "failed" and not cfg["retry"]:
        remedy = "add retry=true to continue from its last checkpoint"
        raise ResumeError(Fault("", f"the run in {folder} failed: {state.reason}", remedy))


def rebuild(rundir: RunDir) -> None:
    """Rebuild a lost or damaged state.json before the run is started again, with a note."""
    if rundir.manifest.exists() and not rundir.is_alive() and (problem := recovery.rebuild_state(rundir)):
        print(f"note: {problem}; rebuilt: {rundir.read_state().reason or 'the run has not started'}", file=sys.stderr)


def refuse_resume(cfg: dict[str, Any]) -> None:
    """Refuse ``resume`` for a sweep, which continues when its command is repeated."""
    if cfg["resume"]:
        remedy = "repeat the command of the sweep: completed runs are skipped, the others continue"
        problem = "is for a single run, but this command starts several"
        raise ResumeError(Fault("resume", problem, remedy, cfg["resume"]))


def make(folder: Path, *, is_new: bool = False) -> tuple[Path, list[Path]]:
    """Create the folder and its missing parents; returns (folder, the created folders, innermost first).

    Args:
        is_new: the folder must not exist yet; if it does, ``folder-2`` … is created instead.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=not is_new)
    except FileExistsError as error:
        if is_new:
            return make(_unused(folder), is_new=True)
        raise ConfigError(Fault("hydra.run.dir", "is a file", "name a folder", folder)) from error
    except OSError as error:
        remedy = "set outputs_dir (or hydra.run.dir) to a folder that can be written"
        raise ConfigError(Fault("outputs_dir", f"cannot be written: {error.strerror}", remedy, folder)) from error
    return folder, missing


def folder_of(cfg: dict[str, Any]) -> Path:
    if not str(cfg["resume"]).strip():
        remedy = "name a run, or leave it out (is a shell variable empty?)"
        raise ResumeError(Fault("resume", "is empty", remedy, cfg["resume"]))
    folder = user_path(cfg["resume"], "resume")
    if os.path.isdir(folder):
        return folder.resolve()
    return lookup.resolve_run(cfg["resume"], Path(cfg["outputs_dir"])).path


def _twin_or_new(cfg: dict[str, Any], composed: Path, *, named: bool) -> Path:
    twin = manifest.find_twin(Path(cfg["outputs_dir"]), manifest.signature(cfg))
    if twin:
        return twin.path
    print("resume=auto: no unfinished run with this configuration; starting a new run", file=sys.stderr)
    return composed if named else _unused(composed)


def _mention_twin(cfg: dict[str, Any]) -> None:
    twin = manifest.find_twin(Path(cfg["outputs_dir"]), manifest.signature(cfg))
    if twin and twin.is_alive():
        print(f"note: a run with the same configuration is training in {twin.path}", file=sys.stderr)
    elif twin:
        print(f"note: an unfinished run with this configuration is in {twin.path}", file=sys.stderr)
        print("      starting a new run; to continue the old one, use resume=auto", file=sys.stderr)


def _unused(folder: Path) -> Path:
    """``folder``, or ``folder-2`` … if it exists (a run that started in the same second)."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000))
    return next(path for path in (folder, *numbered) if not path.exists())
