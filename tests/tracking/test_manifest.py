"""Identity, freezing and the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import node

from runner import PACKAGE
from runner.errors import ConfigError, ResumeError
from runner.tracking import manifest, provenance
from runner.tracking.rundir import RunDir


def config(**changes: Any) -> dict[str, Any]:
    return {
        "name": None,
        "seed": 0,
        "outputs_dir": "outputs",
        "resume": None,
        "retry": False,
        "tracking": node("tracking", "offline"),
        "launcher": {},
        "data": {"path": None},
        "model": {"path": "org/name"},
        **changes,
    }


def test_keys_that_change_nothing_computed_leave_the_signature_alone():
    first = manifest.signature(config())
    assert len(first) == 16
    others = {"name": "x", "outputs_dir": "/a", "resume": "auto", "retry": True, "tracking": {"uri": "sqlite:///x"}}
    for key, value in others.items():
        assert manifest.signature(config(**{key: value})) == first, key
    assert manifest.signature(config(seed=1)) != first
    assert manifest.signature(config(model={"path": "org/other"})) != first


def test_freezing_makes_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    frozen = manifest.freeze(config(data={"path": "rows.jsonl"}))
    assert frozen["data"]["path"] == str(tmp_path / "rows.jsonl")
    assert frozen["model"]["path"] == "org/name"
    assert frozen["outputs_dir"] == str(tmp_path / "outputs")


@pytest.mark.parametrize("pattern", ["data/**/*.jsonl", "data/*/*/rows.jsonl", "data/**/rows.jsonl"])
def test_a_glob_is_frozen_with_its_folder_however_deep_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
):
    monkeypatch.chdir(tmp_path)
    Path("data/a/b").mkdir(parents=True)
    Path("data/a/b/rows.jsonl").touch()
    assert manifest.freeze(config(data={"path": pattern}))["data"]["path"] == str(tmp_path / pattern)
    assert manifest.freeze(config(data={"path": "other/**/*.jsonl"}))["data"]["path"] == "other/**/*.jsonl"


def test_a_folder_is_prepared_once_and_kept(tmp_path: Path):
    rundir = manifest.create(config(), tmp_path / "run", ["runner", "seed=0"], ["seed=0"])
    written = rundir.read_manifest()
    assert written["signature"] == manifest.signature(config())
    assert written["name"] == "seed=0"
    assert written["versions"]["torch"]
    assert written["git"].keys() >= {"sha", "dirty"}
    assert written["code_sha256"] == provenance.digest_of_code(PACKAGE)
    assert manifest.read_config(rundir) == config()
    assert manifest.create(config(), tmp_path / "run", [], []).read_manifest()["id"] == written["id"]


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path):
    manifest.create(config(), tmp_path, [], [])
    with pytest.raises(ResumeError, match="contains a run with another configuration"):
        manifest.create(config(seed=1), tmp_path, [], [])


def test_the_latest_unfinished_twin_is_found(tmp_path: Path):
    name = manifest.signature(config())
    assert manifest.find_twin(tmp_path, name) is None
    for number, status in enumerate(["completed", "killed", "failed", "preempted"]):
        rundir = manifest.create(config(), tmp_path / "day" / str(number), [], [])
        rundir.write_state(status=status)
    manifest.create(config(seed=1), tmp_path / "day" / "other", [], [])
    assert manifest.find_twin(tmp_path, name) == RunDir(tmp_path / "day" / "3")


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path):
    with pytest.raises(ResumeError, match="is not a run folder"):
        manifest.read_config(RunDir(tmp_path))


def test_runs_share_the_groups_of_their_configurations_only_where_asked(tmp_path: Path):
    first, second = (manifest.create(config(seed=seed), tmp_path / str(seed), [], []) for seed in (0, 1))
    shared = [manifest.read_config(rundir, shares=True) for rundir in (first, second)]
    assert shared == [config(), config(seed=1)]
    assert shared[0]["model"] is shared[1]["model"]
    assert manifest.read_config(first)["model"] is not manifest.read_config(first)["model"]
    old = "quant: {_target_: runner.quant.int8}\nmodel: &m {path: a}\nteacher: *m\n"
    first.config.write_text(old)
    assert manifest.read_config(first, shares=True) == manifest.read_config(first)
    first.config.write_text("data: {_target_: my_lab.rows, _code_: [/elsewhere]}\n")
    with pytest.raises(ConfigError, match="_code_: cannot be set"):
        manifest.read_config(first, shares=True)
    first.config.write_text("code: {my_lab: 0123}\ndata: {_target_: my_lab.rows}\n")
    assert manifest.read_config(first, shares=True)["data"]["_code_"] == [str(first.code / "my_lab.py")]
