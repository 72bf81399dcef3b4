"""Shared fixtures. Everything runs offline; models are real but tiny unless a test says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for the whole session (RUNNER_CACHE): conversions and tokenised data are made once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["RUNNER_CACHE"] = str(folder)
    return folder
