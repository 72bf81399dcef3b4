"""Where a run is in MLflow: its store, its experiment's artifacts, and the ids in its manifest."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import DamagedError
from runner.secrets import take_credentials
from runner.tracking import environment, manifest
from runner.tracking.mlflow import store
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import sweep_of
from runner.tracking.trackers import Tracking, store_uri

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass
class Seen:
    """What a store has, asked once for many runs."""

    unknown: set[str] = field(default_factory=set)
    """Ids of runs (``id`` of the manifest) that the store does not have."""
    experiments: dict[str, str] = field(default_factory=dict)
    """Name → id."""


def home(rundir: RunDir, tracking: Tracking, outputs_dir: str | Path) -> str:
    """URI of the store of a run: the configured one; with ``tracking=offline`` the one it was uploaded to, if any,
    else the one of the environment (``MLFLOW_TRACKING_URI``).
    """
    if tracking.kind == "offline":
        with contextlib.suppress(OSError, ValueError):  # a damaged manifest is reported elsewhere
            recorded = str((rundir.read_manifest().get("mlflow") or {}).get("uri") or "")
            if recorded and store.is_there(recorded):
                return recorded
        if uri := environment.store_uri():
            return manifest.credentials_into_environment(uri)
    return store_uri(tracking, outputs_dir)


def artifacts_dir(uri: str, outputs_dir: str | Path) -> Path | None:
    """Artifact folder of the embedded store; None if a server decides."""
    return None if store.is_server(uri) else Path(outputs_dir, "mlartifacts")


def note(rundir: RunDir, uri: str, run: Run, **more: Any) -> None:
    """Record the ids of the MLflow run in the manifest; a recorded parent run in another store is removed."""
    recorded = rundir.read_manifest().get("mlflow") or {}
    if (updated := noted(recorded, uri, run, **more)) != recorded:
        rundir.update_manifest(mlflow=updated)


def noted(recorded: dict[str, Any], uri: str, run: Run, **more: Any) -> dict[str, Any]:
    """``recorded``, the entry ``mlflow`` of a manifest, with the ids of the run."""
    ids = where(uri, run)
    return {**(recorded if recorded.get("uri", ids["uri"]) == ids["uri"] else {}), **ids, **more}


def parent_of(rundir: RunDir, uri: str) -> dict[str, str]:
    """{parent_run_id} of a run whose sweep has a parent run in this store; else empty."""
    sweep, recorded = sweep_of(rundir), dict[str, Any]()
    with contextlib.suppress(DamagedError):  # sync reports it
        recorded = (sweep.read().get("mlflow") or {}) if sweep else {}
    is_here = recorded.get("parent_run_id") and recorded.get("uri") == take_credentials(uri)[0]
    return {"parent_run_id": str(recorded["parent_run_id"])} if is_here else {}


def where(uri: str, run: Run) -> dict[str, Any]:
    """Entry for the manifest: {run_id, experiment_id, uri, url}; ``url``: page of the run on a server, else None."""
    uri, _, _ = take_credentials(uri)
    run_id, experiment = run.info.run_id, run.info.experiment_id
    url = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}" if store.is_server(uri) else None
    return {"run_id": run_id, "experiment_id": experiment, "uri": uri, "url": url}
