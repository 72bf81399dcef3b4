"""Which folder a run gets: the one that was named, that of a run to be taken up, or a new one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runner.config import user_code
from runner.errors import ConfigError, Fault, ResumeError
from runner.tracking import lookup, manifest
from runner.tracking.rundir import RunDir

RESUME_KEYS = ("resume", "retry", "launcher")


def choose(cfg: dict[str, Any], composed: Path, *, named: bool, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """The folder of a single run and the configuration that will be frozen in it.

    Args:
        composed: the folder that Hydra composed (``hydra.run.dir``).
        named: whether the user named it.

    Raises:
        ResumeError: there is no such run, or more was asked for than to continue it.
    """
    if cfg["resume"] == "auto":
        return _twin_or_new(cfg, composed, named=named), cfg
    if cfg["resume"]:
        if named:
            raise ResumeError(Fault("hydra.run.dir", "a resumed run stays in its folder", "leave it out", composed))
        frozen = configuration(cfg, overrides)
        return _resumed(cfg), frozen
    if named:
        return composed, cfg
    _mention_twin(cfg)
    return _unused(composed), cfg


def configuration(cfg: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """What a run is configured as: with ``resume=RUN`` as it was frozen then, and nothing else may be asked for."""
    if cfg["resume"] in (None, "auto"):
        return cfg
    others = [o for o in overrides if o.partition("=")[0].partition(".")[0] not in RESUME_KEYS]
    if others:
        problem = f"continues the run as it was configured and cannot take {', '.join(others)}"
        raise ResumeError(Fault("resume", problem, "leave the others out, or start a new run with them", cfg["resume"]))
    rundir = RunDir(_resumed(cfg))
    frozen = {**manifest.read_config(rundir), "retry": cfg["retry"]}
    for name in user_code.edited(frozen, rundir.read_manifest().get("code") or {}):
        print(f"note: {name} was edited since this run began; the run continues with its own copy, {rundir.code}",
              file=sys.stderr)  # fmt: skip
    return frozen


def refuse(folder: Path, cfg: dict[str, Any]) -> None:
    """Refuse a folder that this run may not use.

    Raises:
        ResumeError: it holds other files, a run of another configuration, or a failed run (without ``retry=true``).
    """
    rundir = RunDir(folder)
    manifest.refuse_files(folder)
    if not rundir.manifest.exists():
        return
    manifest.refuse_other(rundir, cfg)
    state = rundir.read_state()
    if state.status == "failed" and not cfg["retry"]:
        remedy = "add retry=true to continue from its last checkpoint"
        raise ResumeError(Fault("", f"the run in {folder} failed: {state.reason}", remedy))


def refuse_resume(cfg: dict[str, Any]) -> None:
    """``resume`` names one run; a sweep is taken up by its folder."""
    if cfg["resume"]:
        remedy = "give the sweep's command again: what is completed is skipped, the rest goes on"
        raise ResumeError(Fault("resume", "is for a single run, and this starts several", remedy, cfg["resume"]))


def make(folder: Path, *, is_new: bool = False) -> tuple[Path, list[Path]]:
    """Make the folder and those above it; returns it, and those that were not there, innermost first.

    Args:
        is_new: nobody else may have it; where another command was faster it is ``folder-2`` …

    Raises:
        ConfigError: it cannot be made.
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


def _resumed(cfg: dict[str, Any]) -> Path:
    folder = Path(cfg["resume"]).expanduser()
    return folder.resolve() if folder.is_dir() else lookup.resolve_run(cfg["resume"], Path(cfg["outputs_dir"])).path


def _twin_or_new(cfg: dict[str, Any], composed: Path, *, named: bool) -> Path:
    twin = manifest.find_twin(Path(cfg["outputs_dir"]), manifest.signature(cfg))
    if twin:
        return twin.path
    print("resume=auto: no unfinished run of this configuration here; starting a new one", file=sys.stderr)
    return composed if named else _unused(composed)


def _mention_twin(cfg: dict[str, Any]) -> None:
    twin = manifest.find_twin(Path(cfg["outputs_dir"]), manifest.signature(cfg))
    if twin and twin.is_alive():
        print(f"note: the same configuration is being trained in {twin.path}", file=sys.stderr)
    elif twin:
        print(f"note: an unfinished run of this configuration lies in {twin.path}", file=sys.stderr)
        print("      this is a new run; resume=auto would take up the old one", file=sys.stderr)


def _unused(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2`` … where a run began there in the same second."""
    candidates = (wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}") for number in range(1, 1000))
    return next(path for path in candidates if not path.exists())
