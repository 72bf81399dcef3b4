"""Shared fixtures. Everything runs offline; models are real but tiny unless a test says otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.rundir import RunDir

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``--dist loadgroup``: a file stays in one process, with what its tests share; so does all that needs Slurm.

    That comes first: it is the longest, and the other process does the rest meanwhile.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        name = "slurm" if item.get_closest_marker("slurm") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for the whole session (RUNNER_CACHE): conversions and tokenised data are made once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["RUNNER_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without MLflow's, and what it leaves of them in the environment goes with it."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")


def node(group: str, name: str, /, **changes: Any) -> dict[str, Any]:
    """The YAML of an option on top of the one that it builds on, with some keys changed."""
    from runner.config import config_dir

    found = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())
    below = [base for base in found.pop("defaults", []) if base != "_self_"]
    return {**(node(group, below[0]) if below else {}), **found, **changes}


def option(group: str, name: str, /, **changes: Any) -> Any:
    """An option, bound: it waits for its run-time objects."""
    from runner.config import bind

    return bind(node(group, name, **changes), group)


def composed(*overrides: str) -> dict[str, Any]:
    """The checked and frozen configuration of a command line, as a run folder would hold it."""
    from runner import cli

    with cli.composed(list(overrides)) as (_, jobs):
        return dict(jobs[0].cfg)


def prepared(folder: Path, *overrides: str) -> RunDir:
    """A run folder ready for a worker."""
    from runner import prepare

    return prepare.prepare(composed(*overrides), folder, ["runner", *overrides], list(overrides))


TINY = (
    "model=tiny", "tracking=offline", "data.max_length=128", "data.train_rows=64", "data.eval_rows=4",
    "train.sample_prompts=0",
)  # fmt: skip
"""A run of the default shape that takes seconds."""
