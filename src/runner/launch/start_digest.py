"""Resolve ``lora.start=RUN`` and ``task.teacher=RUN`` before anything is written; freeze which weights they have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import lora_start
from runner.errors import ConfigError, Fault
from runner.models import model_folder, sources
from runner.tracking import lookup, origin
from runner.tracking.rundir import RunDir

NAMED, TAUGHT = lora_start.NAMES


def settle(cfg: dict[str, Any]) -> Iterator[Fault]:
    """Replace RUN by FOLDER@DIGEST; yields why that is impossible. A digest that is given already must be that one."""
    yield from _settle_start(cfg)
    yield from _settle_teacher(cfg)


def _settle_teacher(cfg: dict[str, Any]) -> Iterator[Fault]:
    if not (text := lora_start.of(cfg, lora_start.TEACHER)):
        return
    word, wanted = lora_start.split(text)
    try:
        place = _teacher(word, str(cfg.get("outputs_dir")))
    except ConfigError as error:
        yield from (replace(fault, key=TAUGHT, value=word) for fault in error.faults)
        return
    if place is None:  # on the Hub
        return
    digest = origin.digest_of_teacher(place)
    if digest is None:
        yield Fault(TAUGHT, f"{place} has no weights that can be read", "restore them, or name another teacher", word)
    elif wanted and wanted != digest:
        problem = f"the teacher in {place} has other weights now ({digest[:12]}, not {wanted[:12]})"
        yield Fault(TAUGHT, problem, f"restore them, or name the place of the same weights: {TAUGHT}=FOLDER", word)
    else:
        cfg["task"]["teacher"] = lora_start.joined(place, digest)


def _teacher(word: str, outputs_dir: str) -> Path | None:
    """The folder of a run, a model folder or a GGUF file; None for a model on the Hub.

    Raises:
        ConfigError: no such run or model, or an incomplete one.
    """
    path = Path(word).expanduser().absolute()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file() and not RunDir(path.parent).manifest.exists():
        model_folder.check(path)
        return path
    if (path / lora_start.ADAPTER).is_file() and not RunDir(path.parent).manifest.exists():
        problem = "is an adapter, whose base model and chat template are not known"
        raise ConfigError(Fault("", problem, "name the run that trained it, or a whole model (export RUN --merged)"))
    if not path.exists() and "/" in word and sources.HUB_ID.fullmatch(word.partition("@")[0]):
        return None
    from runner.train import trained_model

    is_of_run = path.name == "model" and RunDir(path.parent).manifest.exists()
    rundir = RunDir(path.parent) if is_of_run else lookup.resolve_run(word, Path(outputs_dir).expanduser())
    trained_model.refuse_without_model(rundir)
    return rundir.path


def _settle_start(cfg: dict[str, Any]) -> Iterator[Fault]:
    if not (text := lora_start.of(cfg)):
        return
    word, wanted = lora_start.split(text)
    try:
        folder = _folder(word, str(cfg.get("outputs_dir")))
    except ConfigError as error:
        yield from (replace(fault, key=NAMED, value=word) for fault in error.faults)
        return
    digest = origin.digest_of(folder)
    if digest is None:
        problem = f"{lora_start.adapter_in(folder) / lora_start.WEIGHTS} is missing or damaged"
        yield Fault(NAMED, problem, "restore the file, or train that run again", word)
    elif wanted and wanted != digest:
        problem = f"the adapter in {folder} has other weights now ({digest[:12]}, not {wanted[:12]})"
        yield Fault(NAMED, problem, f"restore it, or name the folder of the same adapter: {NAMED}=FOLDER", word)
    else:
        cfg[lora_start.GROUP][lora_start.KEY] = lora_start.joined(folder, digest)


def _folder(word: str, outputs_dir: str) -> Path:
    """The folder of a run with an adapter, or of a plain adapter.

    Raises:
        ConfigError: no such run, or a run without an adapter.
    """
    path = Path(word).expanduser().absolute()
    if (path / lora_start.ADAPTER).is_file():
        is_of_run = path.name == "model" and RunDir(path.parent).manifest.exists()
        return path.parent if is_of_run else path
    from runner.train import trained_model

    rundir = lookup.resolve_run(word, Path(outputs_dir).expanduser())
    trained_model.refuse_without_model(rundir)
    if not (rundir.model / lora_start.ADAPTER).is_file():
        problem = "trained all weights: it has no adapter to continue"
        raise ConfigError(Fault("", problem, f"start from its model: model=local model.path={rundir.model}"))
    return rundir.path
