"""Environment variables that hold where ``tracking`` is left at its default: MLflow's for store and experiment, and
that of the webhook.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import Fault
from runner.secrets import take_credentials
from runner.tracking import webhook
from runner.tracking.trackers import check_mlflow

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
RUN_ID, EXPERIMENT_ID = "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"
DEFAULT_EXPERIMENT = "runner"
OTHERS = "other trackers: tracking.also=[tensorboard], [wandb] or [trackio]"
WITHOUT_EFFECT = {
    "MLFLOW_TAGS": "set tracking.tags.NAME=VALUE",
    "MLFLOW_NESTED_RUN": "-m makes the runs of a sweep children of one parent run",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "set tracking.system_metrics=true or false",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "set tracking.system_interval_s=…",
    "HF_MLFLOW_LOG_ARTIFACTS": "set tracking.log_model=adapter, true or false",
    "COMET_PROJECT_NAME": OTHERS,
    "CLEARML_PROJECT": OTHERS,
    "NEPTUNE_PROJECT": OTHERS,
}
"""Variables of other programs that users of MLflow and transformers expect to be read → what has that effect here."""
OF_TRACKERS = {
    "wandb": ("WANDB_PROJECT", "WANDB_NAME", "WANDB_ENTITY", "WANDB_RUN_GROUP"),
    "trackio": ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID"),
    "tensorboard": ("TENSORBOARD_LOGGING_DIR",),
}
"""Tracker → variables that say where its runs go. Keys and modes stay set on many machines: they are not mentioned."""


def settle(cfg: dict[str, Any], overrides: Sequence[str]) -> list[Fault]:
    """Write store, experiment and webhook of the environment into ``cfg``, to be frozen with them; returns the faults.

    ``overrides``: what the user set has priority. With ``tracking=offline`` nothing is read.
    """
    tracking = cfg["tracking"]
    if not str(tracking.get("_target_")).endswith(".mlflow"):
        return []
    faults: list[Fault] = []
    if (uri := store_uri()) and tracking.get("uri") in (None, "???") and not _is_set("uri", overrides):
        remedy = f"unset {URI}, or choose the store with tracking.uri=…"
        faults = [
            replace(fault, key=URI, remedy=f"{fault.remedy}; or {remedy}")
            for fault in check_mlflow(uri=uri, experiment=DEFAULT_EXPERIMENT, run_name=None)
        ]
        tracking["uri"] = None if faults else uri
    is_default = tracking.get("experiment") == DEFAULT_EXPERIMENT and not _is_set("experiment", overrides)
    if is_default and (name := os.environ.get(EXPERIMENT)):
        wrong = list(check_mlflow(uri=None, experiment=name, run_name=None))
        faults += [replace(fault, key=EXPERIMENT, remedy=f"{fault.remedy}, or unset it") for fault in wrong]
        tracking["experiment"] = DEFAULT_EXPERIMENT if wrong else name
    elif is_default and (number := os.environ.get(EXPERIMENT_ID)):
        problem, remedy = "has no effect: an experiment is chosen by its name", f"set {EXPERIMENT} instead"
        faults.append(Fault(EXPERIMENT_ID, problem, remedy, number))
    if (url := os.environ.get(webhook.VARIABLE)) and not _is_set("webhook", overrides):
        tracking["webhook"] = url
    if run_id := os.environ.get(RUN_ID):
        faults.append(Fault(RUN_ID, "has no effect: each run gets a new MLflow run", "unset it", run_id))
    return faults


def notes(tracking: Mapping[str, Any]) -> Iterator[str]:
    """A line for each variable of another tracker that is set, and has no effect with this configuration."""
    also = tracking.get("also") or []
    for name, remedy in WITHOUT_EFFECT.items():
        if os.environ.get(name):
            yield f"{name} has no effect: {remedy}"
    for tracker, names in OF_TRACKERS.items():
        if tracker not in also and (given := [name for name in names if os.environ.get(name)]):
            has = "has" if len(given) == 1 else "have"
            yield f"{' and '.join(given)} {has} no effect: tracking.also=[{tracker}] sends the records there, too"


def store_uri() -> str:
    """The store of the environment, with the absolute path of an sqlite file; empty if there is none."""
    uri = os.environ.get(URI, "").strip()
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != uri and path and not path.startswith("/") else uri


def sources(tracking: Mapping[str, Any]) -> Iterator[str]:
    """The variables of this environment that have the values of a frozen configuration."""
    if (uri := take_credentials(store_uri())[0]) and tracking.get("uri") == uri:
        yield URI
    if (name := os.environ.get(EXPERIMENT)) and tracking.get("experiment") == name:
        yield EXPERIMENT


def _is_set(key: str, overrides: Sequence[str]) -> bool:
    return any(word.lstrip("+").startswith(f"tracking.{key}=") for word in overrides)
