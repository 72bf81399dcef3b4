"""Resolve ``lora.start=RUN`` before anything is written: find the adapter, and freeze which weights it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import lora_start
from runner.errors import ConfigError, Fault
from runner.tracking import lookup, origin
from runner.tracking.rundir import RunDir

NAMED = f"{lora_start.GROUP}.{lora_start.KEY}"


def settle(cfg: dict[str, Any]) -> Iterator[Fault]:
    """Replace RUN by FOLDER@DIGEST; yields why that is impossible. A digest that is given already must be that one."""
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
