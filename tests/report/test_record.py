"""What is recorded of a run, read from its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.mirrored_runs import finish, make_run

from runner.errors import ConfigError
from runner.files import copy_of
from runner.report import record


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    rundir = finish(make_run(tmp_path, "mine"), range(1, 4))
    found = record.of_folder(rundir)
    assert found.curves["train/loss"] == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert (found.name, found.status, found.last_step, found.lost) == ("mine", "completed", 3, "")
    assert found.config["lora"]["r"] == 8
    assert found.code is not None
    assert (found.code.sha, found.code.patch) == ("c0ffee", "+ a line\n")
    assert found.mlflow_id == ""
    rundir.update_manifest(git={"sha": None}, mlflow={"run_id": "0123abcd"})
    assert (record.of_folder(rundir).code, record.of_folder(rundir).mlflow_id) == (None, "0123abcd")


def test_a_run_is_found_by_its_folder_and_by_its_name(tmp_path: Path) -> None:
    rundir = finish(make_run(tmp_path, "mine"))
    assert record.find(str(rundir.path), tmp_path) == record.find("mine", tmp_path) == record.of_folder(rundir)
    with pytest.raises(ConfigError, match="there is no run or sweep 'mne'"):
        record.find("mne", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is not a run folder"):
        record.find(str(tmp_path / "empty"), tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    rundir = finish(make_run(tmp_path))
    rundir.config.write_text("lora: [")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        record.of_folder(rundir)
    rundir.manifest.unlink()
    copy_of(rundir.manifest).unlink()
    with pytest.raises(ConfigError, match=r"has no manifest\.json: the preparation of the run was interrupted"):
        record.of_folder(rundir)


def test_a_run_that_has_not_started_has_nothing_to_show(tmp_path: Path) -> None:
    rundir = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r"has not started: nothing here\n    → start it: python -m runner resume="):
        record.refuse_unbegun(record.of_folder(rundir), "nothing here")
    record.refuse_unbegun(record.of_folder(finish(rundir)), "nothing here")
