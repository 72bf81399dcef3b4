"""Run folders with any name: they work, or are refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, TINY, composed, node, option, prepared
from fixtures.slurm_runs import SHORT, SLURM, mlflow_runs, runner

from runner.errors import ConfigError, LaunchError
from runner.launch.slurm import monitor, snapshot, submit
from runner.tracking import trackers
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import refuse_slurm_room, slurm_room

LITERAL = (
    "a b", "it's", 'say "so"', "12:30:00", "what?", "a#b", "a=b", "a,b", "[x]", "*", "$HOME", "größe", "-dash", "a;b",
    "a&b", "(x)", "~", "`x`", "tab\there", "{x}", "!x", "a|b", "<x>", " x ",
)  # fmt: skip
PATTERNS = ("50%", "%j", "%%", "%20", "%A_%a", "new\nline", "a\\b", "a\rb")
"""Slurm or submitit replace them in paths of log files, or cannot read them in a script."""
ALONE = ("-dash", "~", "*", " x ", "tab\there")
"""Names that mean something else as a whole, or at their beginning or end."""
JOINED = tuple("".join(name for name in LITERAL[start::2] if name not in ALONE) for start in (0, 1))
ALL_BUT_DATABASE = "".join(name for name in LITERAL if "?" not in name)
ONE_STEP = (*TINY, "train.max_steps=1", "train.eval_steps=null")


def runs_in(folder: Path, names: tuple[str, ...], *words: str) -> list[RunDir]:
    return [prepared(folder / name / "run", *ONE_STEP, *words) for name in names]


SERVER = TESTS / "launch_server.py"


def launched(rundirs: list[RunDir], name: str, **changes: Any) -> list[int]:
    """The exit codes; in a process of its own, because runs are forks of it and this one may have trained."""
    words = json.dumps([node("launcher", name, **changes), [str(rundir.path) for rundir in rundirs]])
    done = subprocess.run([sys.executable, str(SERVER), words], capture_output=True, text=True, check=True)
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes


def statuses(rundirs: list[RunDir]) -> dict[str, str]:
    """Name → status and reason, of those that are not completed."""
    states = {rundir.path.parent.name: rundir.read_state() for rundir in rundirs}
    return {name: f"{state.status} {state.reason}" for name, state in states.items() if state.status != "completed"}


@pytest.mark.slow
def test_the_local_queue_trains_in_any_folder(tmp_path: Path, cache: Path):
    rundirs = runs_in(tmp_path, (*ALONE, *JOINED, *PATTERNS))
    assert launched(rundirs, "local") == [0] * len(rundirs)
    assert statuses(rundirs) == {}


@pytest.mark.slow
def test_accelerate_trains_in_any_folder(tmp_path: Path, cache: Path):
    rundirs = runs_in(
        tmp_path,
        (*JOINED, "%A_%a", "new\nline", "a\\b"),
        "launcher=accelerate",
        "launcher.processes=2",
    )
    assert launched(rundirs, "accelerate", processes=2) == [0] * len(rundirs)
    assert statuses(rundirs) == {}


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_trains_in_any_folder_that_slurm_takes_literally(slurm: None):
    rundirs = runs_in(Path.cwd(), (*ALONE, *JOINED))
    request = option("launcher", "slurm")().request
    assert submit.submit(request, rundirs, None) == []
    assert monitor.follow(rundirs) == [0] * len(rundirs)
    assert statuses(rundirs) == {}
    for rundir in rundirs:
        job = rundir.read_manifest()["slurm"]["job_id"]
        assert (slurm_room(rundir.path) / f"{job}_0_log.out").is_file()


@pytest.mark.slow
def test_submitits_local_cluster_runs_the_snapshot_in_a_folder_with_a_colon(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ("launcher=slurm", "launcher.cluster=local", "launcher.wait=true", "hydra.run.dir='a:b c/run'")
    done = runner(*SHORT, *words, "tracking=offline")
    assert done.returncode == 0, done.stderr
    assert ":" in RunDir(tmp_path / "a:b c/run").read_manifest()["snapshot"]["folder"]


@pytest.mark.parametrize("name", PATTERNS)
def test_names_that_slurm_replaces_are_refused(name: str):
    with pytest.raises(LaunchError, match="Slurm replaces"):
        refuse_slurm_room(Path("/outputs", name, "run"))


@pytest.mark.parametrize("name", LITERAL)
def test_names_that_slurm_takes_literally_are_not_refused(name: str):
    refuse_slurm_room(Path("/outputs", name, "run"))


@pytest.mark.parametrize("where", [("hydra.run.dir='50%/run'",), ("-m", "seed=1,2", "sweep='50%'")])
def test_nothing_is_written_before_it_is_refused(
    where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = runner(*where, *SHORT, "launcher=slurm", "launcher.cluster=local", "tracking=offline")
    assert done.returncode == 2
    assert "contains '%', which Slurm replaces in the paths of log files" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["what?", "%20", "50%"])
def test_a_database_that_sqlalchemy_would_open_elsewhere_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"outputs_dir=.*MLflow cannot open a database"):
        composed("model=tiny", f"outputs_dir='{name}'")
    assert composed("model=tiny", f"outputs_dir='{name}'", "tracking=offline")["outputs_dir"].endswith(name)
    (fault,) = trackers.check_mlflow(uri=f"sqlite:////{name}/mlflow.db", experiment="x", run_name=None)
    assert fault.problem == "must not contain ? or %"


def test_a_run_below_such_a_folder_is_uploaded_to_another_store(tmp_path: Path):
    rundir = prepared(tmp_path / "what?" / "run", *TINY, f"outputs_dir='{tmp_path}/what?'")
    rundir.write_state(status="completed")
    before = sorted(tmp_path.rglob("*"))
    refused = runner("sync", str(rundir.path))
    assert refused.returncode != 0
    assert "MLflow cannot open a database with ? or % in its path" in refused.stdout + refused.stderr
    assert [path for path in tmp_path.rglob("*.db*") if path not in before] == []
    done = runner("sync", str(rundir.path), f"uri=sqlite:///{tmp_path}/mlflow.db")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mlflow_gets_runs_below_any_other_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ALL_BUT_DATABASE).mkdir()
    monkeypatch.chdir(tmp_path / ALL_BUT_DATABASE)
    done = runner(*SHORT)
    assert done.returncode == 0, done.stderr
    assert [run.info.status for run in mlflow_runs()] == ["FINISHED"]
    assert [path.name for path in tmp_path.iterdir()] == [ALL_BUT_DATABASE]


def mismatch(folder: Path, path: Path) -> str:
    """What a worker with this PYTHONPATH finds out about the snapshot."""
    code = "import pathlib, sys; from runner.launch.slurm import snapshot; "
    code += "print(snapshot.mismatch(pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    return subprocess.check_output([sys.executable, "-c", code, str(folder)], env=environment, text=True).strip()


def test_a_worker_checks_that_it_runs_the_snapshot(tmp_path: Path, cache: Path):
    folder = snapshot.take(tmp_path / "12:30:00")
    link = snapshot.importable(folder)
    assert ":" not in str(link)
    assert snapshot.importable(folder) == link
    assert mismatch(folder, link) == ""
    assert f"instead of the snapshot {folder}: PYTHONPATH does not reach it" in mismatch(folder, folder)
    (folder / "runner" / "worker.py").open("a").write("# edited\n")
    assert "was changed" in mismatch(folder, link)
    shutil.rmtree(folder)
    assert "was removed" in mismatch(folder, folder)
    plain = snapshot.take(tmp_path / "plain")
    assert snapshot.importable(plain) == plain


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_that_runs_other_code_fails_with_the_reason(slurm: None):
    python = f"env -u PYTHONPATH {sys.executable}"
    words = (*SHORT, *SLURM, "launcher.wait=true", "hydra.run.dir=run", "launcher.tasks_per_node=2", "tracking=offline")
    done = runner(*words, f"launcher.python='{python}'")
    assert done.returncode == 1, done.stderr
    state = RunDir(Path("run")).read_state()
    assert (state.status, state.attempt) == ("failed", 0)
    assert "PYTHONPATH does not reach it; check launcher.python" in state.reason
