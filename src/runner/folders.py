"""Which folder a run gets: the one that was named, that of a run to be taken up, or a new one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runner import prepare
from runner.errors import ConfigError, Fault, ResumeError
from runner.rundir import RunDir

RESUME_KEYS = ("resume", "retry")


def choose(cfg: dict[str, Any], composed: Path, *, named: bool, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """The folder of a single run and the configuration that will be frozen in it.

    Args:
        composed: the folder that Hydra composed (``hydra.run.dir``).
        named: whether the user named it.

    Raises:
        ResumeError: the folder holds other files, a failed run (without ``retry=true``), or no run at all.
        ConfigError: no folder can be made there.
    """
    folder = composed
    if cfg["resume"] == "auto":
        folder = _twin_or_new(cfg, composed, named=named)
    elif cfg["resume"]:
        folder, cfg = _taken_up(cfg, Path(cfg["resume"]).resolve(), overrides)
    elif not named:
        _mention_twin(cfg)
        folder = _new(composed)
    refuse_foreign(folder)
    refuse_failed(RunDir(folder), retry=cfg["retry"])
    return folder, cfg


def refuse_foreign(folder: Path) -> None:
    """A folder with other things in it is not ours to write to, nor to clean up."""
    if not RunDir(folder).manifest.exists() and folder.is_dir() and any(folder.iterdir()):
        remedy = "name an empty folder, or the folder of a run"
        raise ResumeError(Fault("hydra.run.dir", "holds other files and no run", remedy, folder))


def refuse_failed(rundir: RunDir, *, retry: bool) -> None:
    state = rundir.read_state()
    if state.status == "failed" and not retry:
        remedy = "add retry=true to continue from its last checkpoint"
        raise ResumeError(Fault("", f"the run in {rundir.path} failed: {state.reason}", remedy))


def _twin_or_new(cfg: dict[str, Any], composed: Path, *, named: bool) -> Path:
    twin = prepare.find_twin(Path(cfg["outputs_dir"]), prepare.signature(cfg))
    if twin:
        return twin.path
    print("resume=auto: no unfinished run of this configuration here; starting a new one", file=sys.stderr)
    return composed if named else _new(composed)


def _taken_up(cfg: dict[str, Any], folder: Path, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """``resume=RUN``: the run's own frozen configuration counts, and nothing else may be asked for."""
    others = [override for override in overrides if override.partition("=")[0] not in RESUME_KEYS]
    if others:
        problem = f"continues the run as it was configured and cannot take {', '.join(others)}"
        raise ResumeError(Fault("resume", problem, "leave the others out, or start a new run with them", folder))
    return folder, {**prepare.read_config(RunDir(folder)), "retry": cfg["retry"]}


def _mention_twin(cfg: dict[str, Any]) -> None:
    twin = prepare.find_twin(Path(cfg["outputs_dir"]), prepare.signature(cfg))
    if twin and twin.is_alive():
        print(f"note: the same configuration is being trained in {twin.path}", file=sys.stderr)
    elif twin:
        print(f"note: an unfinished run of this configuration lies in {twin.path}", file=sys.stderr)
        print("      this is a new run; resume=auto would take up the old one", file=sys.stderr)


def _new(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2`` … where two runs began in the same second; made, so that nobody else takes it."""
    for number in range(1, 1000):
        candidate = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            remedy = "set outputs_dir to a folder that can be written"
            raise ConfigError(Fault("outputs_dir", f"cannot be written: {error.strerror}", remedy, wanted)) from error
        return candidate
    raise AssertionError("a thousand runs in one second")
