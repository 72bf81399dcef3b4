"""What came of runs: one flat record each, of what was set and what was measured, read from run folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import terminal
from runner.config import choices
from runner.config.bind import flatten
from runner.errors import RunnerError
from runner.tracking import lookup, manifest, metrics_log, run_status
from runner.tracking.metrics_log import SECONDS, last_values
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import sweep_of

COMPLETED = "completed"


@dataclass(frozen=True)
class Result:
    """One run."""

    run: str
    """What to type where RUN is asked for."""
    label: str
    """What it is called: ``quant=4bit,lora.r=8``."""
    status: str
    reason: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    """The configuration, flattened with dots; a group is its option's name: {"quant": "4bit", "lora.r": "8"}."""
    implied: frozenset[str] = frozenset()
    """Those keys of ``params`` that stand as the option of their group has them."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name → the last value; an infinite or missing number is not there."""
    sweep: str = ""
    folder: str = ""
    """Absolute; empty where it is not on this machine."""
    mlflow_id: str = ""
    store: str = ""
    """The MLflow store that the folder's run was told to; empty where it was told to none, or was read from one."""
    created: float = 0.0
    step: int = 0
    total_steps: int = 0
    device: str = ""

    @property
    def is_completed(self) -> bool:
        return self.status == COMPLETED


def of_folders(rundirs: Sequence[RunDir], outputs_dir: Path) -> list[Result]:
    """The results of these runs as they stand now; one whose files are damaged says so."""
    sweeps = {rundir.path.parent for rundir in rundirs if sweep_of(rundir)}
    return [_of(standing, outputs_dir, is_alone=len(sweeps) < 2) for standing in run_status.of(rundirs)]


def read_records(folder: str) -> list[dict[str, Any]]:
    """The records of a run's folder; none where it is not there or cannot be read."""
    try:
        return metrics_log.read(RunDir(Path(folder))) if folder else []
    except (OSError, json.JSONDecodeError):
        return []


def _of(found: RunStatus, outputs_dir: Path, *, is_alone: bool) -> Result:
    rundir, state, said = found.rundir, found.state, found.manifest
    sweep = sweep_of(rundir)
    status, reason, implied = found.status, found.reason, frozenset[str]()
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    if status not in ("missing", "damaged"):
        try:
            flat = dict(flatten(manifest.read_config(rundir)))
            params, implied = choices.named(flat, manifest.choices(said))
            later = ({"step": r["step"], **r["metrics"]} for r in metrics_log.read_evaluations(rundir))
            metrics = last_values([*metrics_log.read(rundir), *later])
        except (RunnerError, *lookup.DAMAGED) as error:
            status, reason = "damaged", str(error)
    if state.seconds:
        metrics[SECONDS] = state.seconds
    hardware, mlflow = said.get("hardware") or {}, said.get("mlflow") or {}
    return Result(
        run=_handle(rundir, sweep.path if sweep else None, outputs_dir, is_alone),
        label=found.label,
        status=status,
        reason=reason,
        params=params,
        implied=implied,
        metrics=metrics,
        sweep=sweep.path.name if sweep else "",
        folder=str(rundir.path),
        mlflow_id=str(mlflow.get("run_id") or ""),
        store=str(mlflow.get("uri") or ""),
        created=float(said.get("created") or 0),
        step=state.step,
        total_steps=state.total_steps,
        device=str(hardware.get("device_name") or ""),
    )


def _handle(rundir: RunDir, sweep: Path | None, outputs_dir: Path, is_alone: bool) -> str:
    """The shortest that is understood: the folder's name among those of one sweep, SWEEP/NAME, or the folder."""
    if sweep:
        return rundir.path.name if is_alone else f"{sweep.name}/{rundir.path.name}"
    if rundir.path.is_relative_to(outputs_dir.absolute()):
        return str(rundir.path.relative_to(outputs_dir.absolute()))
    return terminal.nearest(rundir.path)
