"""The tags of a run in MLflow."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

from runner.tracking import origin
from runner.tracking.machine import user
from runner.tracking.metrics_log import before_and_after, of_model, read
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.trackers import Tracking

PARENT_TAG, KIND_TAG, NOTE_TAG = "mlflow.parentRunId", "runner.kind", "mlflow.note.content"
MODEL_METRICS = "runner.model_metrics"
"""The evaluation of the weights in ``model`` as JSON, if they are not the last ones: MLflow shows the last values."""


def of_run(rundir: RunDir, manifest: dict[str, Any], state: State) -> dict[str, Any]:
    """Tags of a run. Includes MLflow's own tags, which MLflow would fill with data of the upload process."""
    git, command = manifest.get("git") or {}, manifest.get("command") or []
    own = (manifest.get("repositories") or [{}])[0]
    return {
        KIND_TAG: "run",
        "runner.signature": manifest.get("signature"),
        "runner.command": _line(command),
        "runner.sweep": manifest.get("sweep"),
        "runner.status": state.status,
        "runner.reason": state.reason,
        "runner.best_step": state.summary.get("best step"),
        MODEL_METRICS: _model_metrics(rundir, state),
        "runner.task_metrics": " ".join(before_and_after(state.summary)),
        "runner.attempt": state.attempt,
        "runner.folder": str(rundir.path),
        "runner.host": state.host,
        "runner.slurm_job_id": state.scheduler_id,
        "runner.git_sha": git.get("sha"),
        "runner.git_dirty": git.get("dirty"),
        "runner.rerun_of": (manifest.get("rerun") or {}).get("of"),
        "runner.came_from": origin.nearest(manifest),
        "runner.chain": origin.chain(manifest),
        "runner.teacher": origin.teacher(manifest) or None,
        PARENT_TAG: (manifest.get("mlflow") or {}).get("parent_run_id"),
        "mlflow.source.name": source_name(command),
        "mlflow.source.type": "JOB" if state.scheduler_id else "LOCAL",
        "runner.own_git_sha": own.get("sha"),
        "runner.own_git_dirty": own.get("dirty"),
        "mlflow.source.git.commit": own.get("sha") or git.get("sha"),
        "mlflow.user": user(),
    }


def of_user(tracking: Tracking) -> dict[str, str | None]:
    """The user's own tags and notes. Only for a new run: they may be edited in MLflow."""
    return {**tracking.tags, NOTE_TAG: tracking.notes}


def source_name(command: str | list[str]) -> str:
    """The command for MLflow's column Source, which shows only what follows the last slash: so without folders."""
    return re.sub(r"[^\s=,:;()\[\]{}'\"]*/", "", _line(command))


def _model_metrics(rundir: RunDir, state: State) -> str:
    if state.model_step == state.step:
        return ""
    metrics = of_model(state, read(rundir))
    return json.dumps({name: value for name, value in metrics.items() if math.isfinite(value)})


def _line(command: str | list[str]) -> str:
    return command if isinstance(command, str) else shlex.join(command)
