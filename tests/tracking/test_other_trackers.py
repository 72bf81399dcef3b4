"""Whether the trackers of ``tracking.also`` can be used here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import composed

from runner.errors import ConfigError
from runner.tracking import other_trackers

RUN = ("model=tiny", "train.max_steps=1", "tracking=mlflow")


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        return None

    monkeypatch.setattr(other_trackers.importlib.util, "find_spec", find_spec)
    with pytest.raises(ConfigError, match=r"(?s)tracking.also=tensorboard: needs the package.*uv pip install tensorbo"):
        composed(*RUN, "tracking.also=[tensorboard]")


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (fault,) = other_trackers.faults(["no_such_tracker"])  # type: ignore[list-item]
    assert "not installed" in fault.problem


@pytest.mark.parametrize(
    ("words", "problem"),
    [("[tensorbord]", "one of tensorboard, wandb, trackio"), ("mlflow", "one of tensorboard, wandb, trackio")],
)
def test_other_names_are_refused(words: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        composed(*RUN, f"tracking.also={words}")


def test_without_mlflow_there_is_no_process_that_sends() -> None:
    with pytest.raises(ConfigError, match="tracking=mlflow and tracking=server"):
        composed("model=tiny", "tracking=offline", "tracking.also=[tensorboard]")


@pytest.mark.parametrize("way", ["key", "mode", "netrc", "settings", ""])
def test_wandb_needs_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    if way == "key":
        monkeypatch.setenv("WANDB_API_KEY", "x")
    elif way == "mode":
        monkeypatch.setenv("WANDB_MODE", "offline")
    elif way == "netrc":
        (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    elif way == "settings":
        (tmp_path / "config/settings").write_text("[default]\nmode = offline\n")
    problems = [fault.problem for fault in other_trackers.faults(["wandb"])]
    assert problems == ([] if way else ["W&B is not logged in, and WANDB_API_KEY is not set"])
