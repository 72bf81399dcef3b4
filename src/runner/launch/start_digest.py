"""Resolve ``lora.start=RUN`` and ``task.teacher=RUN`` before anything is written; freeze which weights they have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import pinned_weights
from runner.errors import ConfigError, Fault
from runner.files import user_path
from runner.models import model_folder, sources
from runner.tracking import lookup, origin
from runner.tracking.rundir import RunDir


def settle(cfg: dict[str, Any]) -> Iterator[Fault]:
    """Replace RUN by FOLDER@DIGEST; yields why that is impossible. A digest that is given already must be that one."""
    yield from _settle(cfg, pinned_weights.START, _adapter, origin.digest_of)
    yield from _settle(cfg, pinned_weights.TEACHER, _teacher, origin.digest_of_teacher)


def _settle(
    cfg: dict[str, Any],
    place: tuple[str, str],
    find: Callable[[str, Path], Path | None],
    digest_of: Callable[[Path], str | None],
) -> Iterator[Fault]:
    """Settle one key. ``find``: (RUN, outputs_dir) → the folder of its weights; None for a model on the Hub."""
    if not (text := pinned_weights.of(cfg, place)):
        return
    (group, name), key = place, ".".join(place)
    word, wanted = pinned_weights.split(text)
    try:
        folder = find(word, user_path(str(cfg.get("outputs_dir")), "outputs_dir"))
    except ConfigError as error:
        yield from (replace(fault, key=key, value=word) for fault in error.faults)
        return
    if folder is None:
        return
    digest = digest_of(folder)
    if digest is None:
        yield Fault(key, f"the weights in {folder} are missing or damaged", "restore them, or name another run", word)
    elif wanted and wanted != digest:
        problem = f"{folder} has other weights now ({digest[:12]}, not {wanted[:12]})"
        yield Fault(key, problem, f"restore them, or name the place of the same weights: {key}=FOLDER", word)
    else:
        cfg[group][name] = pinned_weights.joined(folder, digest)


def _teacher(word: str, outputs_dir: Path) -> Path | None:
    """The folder of a run, a model folder or a GGUF file; None for a model on the Hub.

    Raises:
        ConfigError: no such run or model, or an incomplete one.
    """
    path = user_path(word).absolute()
    if os.path.isfile(path) and path.suffix == ".gguf":
        return path
    if os.path.isfile(path / "config.json") and not RunDir(path.parent).manifest.exists():
        model_folder.check(path)
        return path
    if os.path.isfile(path / pinned_weights.ADAPTER) and not RunDir(path.parent).manifest.exists():
        problem = "is an adapter, whose base model and chat template are not known"
        raise ConfigError(Fault("", problem, "name the run that trained it, or a whole model (export RUN --merged)"))
    if not os.path.exists(path) and "/" in word and sources.HUB_ID.fullmatch(word.partition("@")[0]):
        return None
    return _run(word, path, outputs_dir).path


def _adapter(word: str, outputs_dir: Path) -> Path:
    """The folder of a run with an adapter, or of a plain adapter.

    Raises:
        ConfigError: no such run, or a run without an adapter.
    """
    path = user_path(word).absolute()
    if os.path.isfile(path / pinned_weights.ADAPTER) and not _is_of_run(path):
        return path
    rundir = _run(word, path, outputs_dir)
    if not (rundir.model / pinned_weights.ADAPTER).is_file():
        problem = "trained all weights: it has no adapter to continue"
        raise ConfigError(Fault("", problem, f"start from its model: model=local model.path={rundir.model}"))
    return rundir.path


def _run(word: str, path: Path, outputs_dir: Path) -> RunDir:
    """The run that is named by ``word``, or whose folder ``model`` is ``path``; it must have a model."""
    from runner.train import trained_model

    rundir = RunDir(path.parent) if _is_of_run(path) else lookup.resolve_run(word, outputs_dir)
    trained_model.refuse_without_model(rundir)
    return rundir


def _is_of_run(path: Path) -> bool:
    return path.name == "model" and RunDir(path.parent).manifest.exists()
