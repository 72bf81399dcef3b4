"""Read run folders into results: one flat record for each run, with its parameters and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import terminal
from runner.config import choices
from runner.errors import RunnerError
from runner.tracking import lookup, manifest, metrics_log, origin, run_status
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import sweep_of

COMPLETED = "completed"
UI = "http://127.0.0.1:5000"
"""The address of the verb ``ui``, if its port is free."""
TRAINING = "workflowType=machine_learning"
"""Without it MLflow 3 shows the menu of its mode for GenAI."""


@dataclass(frozen=True)
class Result:
    """One run."""

    run: str
    """A value for RUN on the command line."""
    label: str
    """The name to show: ``quant=4bit,lora.r=8``."""
    status: str
    reason: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    """The configuration flattened with dots; a group has its option's name: {"quant": "4bit", "lora.r": "8"}."""
    implied: frozenset[str] = frozenset()
    """The keys of ``params`` whose values follow from the chosen option of their group."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name → last value; only finite numbers."""
    sweep: str = ""
    folder: str = ""
    """Absolute path; empty if the folder is not on this machine."""
    mlflow_id: str = ""
    store: str = ""
    """URI of the MLflow store that the run logs to; empty with tracking=offline, or for a result read from MLflow."""
    mlflow_url: str = ""
    """The page of the run in MLflow; for the embedded store where ``runner ui`` serves it; empty if it has none."""
    created: float = 0.0
    task_metrics: tuple[str, ...] = ()
    """The metrics that the task reports before and after training; empty if they are not known."""
    step: int = 0
    total_steps: int = 0
    device: str = ""
    came_from: str = ""
    """The runs whose weights this run started from, the nearest first; see ``origin.chain``."""
    held_out_rows: int | None = None
    """Rows on which the held-out loss is measured; None if it is not known."""

    @property
    def is_completed(self) -> bool:
        return self.status == COMPLETED


def of_folders(rundirs: Sequence[RunDir], outputs_dir: Path) -> list[Result]:
    """The current results of these runs; a run with damaged files has the status ``damaged``."""
    sweeps = {sweep.path for sweep in map(sweep_of, rundirs) if sweep}
    return [_of(status, outputs_dir, is_one_sweep=len(sweeps) < 2) for status in run_status.of(rundirs)]


def read_records(folder: str) -> list[dict[str, Any]]:
    """The records in metrics.jsonl of a run folder; an empty list if they cannot be read."""
    try:
        return metrics_log.read(RunDir(Path(folder))) if folder else []
    except (OSError, json.JSONDecodeError):
        return []


def _of(run: RunStatus, outputs_dir: Path, *, is_one_sweep: bool) -> Result:
    rundir, state = run.rundir, run.state
    sweep = sweep_of(rundir)
    status, reason, implied = run.status, run.reason, frozenset[str]()
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    if status not in ("missing", "damaged"):
        try:
            config = manifest.read_config(rundir, shares=True)
            params, implied = choices.of_config(config, manifest.choices(run.manifest))
            later = [{"step": r["step"], **r["metrics"]} for r in metrics_log.read_evaluations(rundir)]
            records = metrics_log.read(rundir)
            metrics, lost = metrics_log.of_run(state, records, config, later)
            reason = lost or reason
        except (RunnerError, *lookup.DAMAGED) as error:
            status, reason = "damaged", str(error)
    hardware, mlflow = run.manifest.get("hardware") or {}, run.manifest.get("mlflow") or {}
    return Result(
        run=_handle(rundir, sweep.path if sweep else None, outputs_dir, is_one_sweep),
        label=run.label,
        status=status,
        reason=reason,
        params=params,
        implied=implied,
        metrics=metrics,
        sweep=sweep.path.name if sweep else "",
        folder=str(rundir.path),
        mlflow_id=str(mlflow.get("run_id") or ""),
        store=str(mlflow.get("uri") or ""),
        mlflow_url=_page_of(mlflow),
        created=float(run.manifest.get("created") or 0),
        task_metrics=tuple(metrics_log.before_and_after(state.summary)),
        step=state.step,
        total_steps=state.total_steps,
        device=str(hardware.get("device_name") or ""),
        came_from=origin.chain(run.manifest),
        held_out_rows=((run.manifest.get("data") or {}).get("report") or {}).get("eval_rows"),
    )


def _page_of(mlflow: Mapping[str, Any]) -> str:
    run, experiment = mlflow.get("run_id"), mlflow.get("experiment_id")
    return str(mlflow.get("url") or (f"{UI}/#/experiments/{experiment}/runs/{run}?{TRAINING}" if run else ""))


def _handle(rundir: RunDir, sweep: Path | None, outputs_dir: Path, is_one_sweep: bool) -> str:
    """The shortest valid RUN: the folder's name if all runs are of one sweep, else SWEEP/NAME or the path."""
    if sweep:
        return rundir.path.name if is_one_sweep else f"{sweep.name}/{rundir.path.name}"
    if rundir.path.is_relative_to(outputs_dir.absolute()):
        return str(rundir.path.relative_to(outputs_dir.absolute()))
    return terminal.nearest(rundir.path)
