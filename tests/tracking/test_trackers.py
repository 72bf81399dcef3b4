"""Options of the group tracking."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, composed
from conftest import node as option_of

from runner.config.bind import bind, config_dir, find_faults
from runner.tracking import metrics_log, trackers
from runner.tracking.mirror import spawn
from runner.tracking.rundir import RunDir

OPTION: dict[str, Any] = {
    "_target_": "runner.tracking.trackers.mlflow",
    "uri": None,
    "experiment": "runner",
    "run_name": None,
    "log_model": "adapter",
    "system_metrics": True,
    "system_interval_s": 10.0,
}


def record(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "time": 1.5 + step, **metrics}


@pytest.mark.parametrize("name", ["mlflow", "server", "offline"])
def test_yaml_binds(name: str) -> None:
    node = yaml.safe_load((config_dir() / "tracking" / f"{name}.yaml").read_text())
    assert node.pop("uri", None) in (None, "???")
    made = bind(
        node | ({"uri": "http://127.0.0.1:5000"} if name == "server" else {} if name == "offline" else {"uri": None})
    )()
    assert made.kind == ("offline" if name == "offline" else "mlflow")
    assert made.experiment == "runner"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "sqlite under outputs_dir"),
        ("mlruns", "sqlite under outputs_dir"),
        ("file:///tmp/mlruns", "no longer supports"),
        ("localhost:5000", "http://localhost:5000"),
        ("htp://host", "did you mean 'http'?"),
        ("http:///path", "has no host"),
        ("http://host:port", "an invalid port"),
        ("http://ho st", "has no host"),
        ("sqlite:///mlflow.db", "absolute path"),
        ("sqlite://", "absolute path"),
        ("postgresql+nodriver://host/db", "needs the package nodriver"),
        ("", "is empty"),
    ],
)
def test_a_wrong_uri_is_a_fault_without_importing_mlflow(uri: str, said: str) -> None:
    faults = list(find_faults({**OPTION, "uri": uri}, "tracking"))
    assert [fault.key for fault in faults] == ["tracking.uri"]
    assert said in str(faults[0])


def test_faults_of_names_and_numbers() -> None:
    node = {**OPTION, "experiment": "x" * 300, "run_name": "x" * 300, "uri": "mlruns"}
    assert [fault.key for fault in find_faults(node)] == ["experiment", "run_name", "uri"]
    wrong = {**OPTION, "system_interval_s": 0, "log_model": "all", "experimant": "x"}
    assert {fault.key for fault in find_faults(wrong)} == {"system_interval_s", "log_model", "experimant"}


@pytest.mark.parametrize(
    ("tags", "key", "problem"),
    [
        ({"runner.status": "done"}, "tags.runner.status", "runner sets itself"),
        ({"mlflow": {"note": {"content": "x"}}}, "tags.mlflow.note.content", "runner sets itself"),
        ({"a?b": 1}, "tags.a?b", "admits no tag"),
        ({"team": None}, "tags.team", "has no value"),
        ({"team": {}}, "tags.team", "has no value"),
        ("nlp", "tags", "must be a mapping"),
    ],
)
def test_a_wrong_tag_is_a_fault(tags: Any, key: str, problem: str) -> None:
    for node in (OPTION, option_of("tracking", "offline")):
        (fault,) = find_faults({**node, "tags": tags})
        assert (fault.key, problem in str(fault)) == (key, True)


def test_tags_and_notes_are_set_on_the_command_line() -> None:
    words = ("tracking.tags.team=nlp", "tracking.tags.try=2", "tracking.tags.on.cluster=true", "tracking.notes='a, b'")
    for kind in ("mlflow", "offline"):
        tracking = bind(composed(*TINY[2:], "model=tiny", f"tracking={kind}", *words)["tracking"])()
        assert tracking.tags == {"team": "nlp", "try": "2", "on.cluster": "true"}
        assert tracking.notes == "a, b"
    without = {key: value for key, value in OPTION.items() if key not in ("tags", "notes")}
    assert (bind(without)().tags, bind(without)().notes) == ({}, None), "runs of earlier versions have no such keys"


def test_right_uris_pass_and_passwords_are_not_shown() -> None:
    for uri in ("http://127.0.0.1:5000", "https://me:secret@host/path", "sqlite:////tmp/mlflow.db", None):
        assert list(find_faults({**OPTION, "uri": uri})) == []
    assert "hunter2" not in str(next(find_faults({**OPTION, "uri": "htp://me:hunter2@host"})))


def test_the_store_is_embedded_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.store_uri(bind(OPTION)(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert trackers.store_uri(bind(OPTION)(), "outputs") == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert trackers.store_uri(bind({**OPTION, "uri": "http://host"})(), tmp_path) == "http://host"


def test_offline_starts_nothing(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    metrics_log.append(rundir, record(1))
    rundir.update_manifest(tracking="offline")
    assert spawn.start_mirror(rundir) is None
    result = spawn.wait_mirror(None, rundir)
    assert (result.url, result.unsent) == (None, 1)
    assert result.message == "tracking=offline"


def test_importing_is_light() -> None:
    heavy = (
        "import sys, runner.tracking, runner.secrets; print({'mlflow', 'torch', 'pandas', 'psutil'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("dropped", "step", "evaluated", "words"),
    [
        ((), 6, True, ""), ((), 10, True, ""), ((), 4, False, ""),
        ((("eval", 0),), 6, True, "1 of 5 records up to step 6 are missing (of step 0)"),
        ((("train", 4), ("eval", 5)), 6, True, "2 of 5 records up to step 6 are missing (of step 4, 5)"),
        ((("train", 8), ("eval", 10)), 6, True, ""),
        ((("eval", 10),), 10, True, "1 of 8 records up to step 10 are missing (of step 10)"),
        ((("eval", 5),), 5, False, ""),
        ((("eval", 5),), 5, True, "1 of 4 records up to step 5 are missing (of step 5)"),
    ],
)  # fmt: skip
def test_lost_records_are_those_that_the_configuration_asks_for(
    dropped: tuple[tuple[str, int], ...], step: int, evaluated: bool, words: str
) -> None:
    records = [
        {"step": each, "train/learning_rate": 0.1} for each in (2, 4, 6, 8, 10) if ("train", each) not in dropped
    ]
    records += [{"step": each, "eval/loss": 1.0} for each in (0, 5, 10) if ("eval", each) not in dropped]
    train = {"logging_steps": 2, "eval_steps": 5}
    assert words in metrics_log.lost(records, train, step, 10, evaluated=evaluated)
    assert bool(words) == bool(metrics_log.lost(records, train, step, 10, evaluated=evaluated))
