"""A sweep from the command line: six jobs, the same again, more values, a failing one; one parent and a child each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from runner.sweep import folder
from runner.sweep import session as sweeping
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

SMALL = (
    *(word for word in TINY if not word.startswith("tracking=")),
    "train.max_steps=3",
    "tracking.system_metrics=false",
)


def runner(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m runner`` with these words; the environment is the test's."""
    command = [sys.executable, "-m", "runner", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def attempts(sweep: SweepDir) -> dict[str, int]:
    labels = [job["label"] for job in sweep.read()["jobs"].values()]
    return {label: rundir.read_state().attempt for label, rundir in zip(labels, sweep.rundirs(), strict=True)}


def mlflow_runs(outputs: Path) -> tuple[list[Any], list[Any]]:
    """The parents and the children in the embedded database."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags], [
        run for run in runs if "mlflow.parentRunId" in run.data.tags
    ]


@dataclass
class Stopped:
    """A launcher whose runs all end with one code."""

    code: int
    is_detached: bool = False

    def launch(self, rundirs: list[RunDir], _: SweepDir) -> list[int]:
        return [self.code] * len(rundirs)


@pytest.mark.parametrize(
    ("code", "others", "told"), [(1, 0, ""), (130, None, "jobs of other launchers were not started: b")]
)
def test_a_stop_reaches_other_launchers_and_a_failure_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, others: int | None, told: str
):
    session = sweeping.Session(None, [])
    entries = [sweeping.Entry(folder.SweepJob({"retry": False}, n, ""), RunDir(tmp_path / n), None) for n in "ab"]
    session._launch(SweepDir(tmp_path), entries, [(Stopped(code), [0]), (Stopped(0), [1])])
    assert [entry.code for entry in entries] == [code, others]
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_again_and_with_more_values(tmp_path: Path, cache: Path):
    six = ("-m", *SMALL, "quant=none,8bit,4bit", "lora.r=4,8")
    done = runner(*six, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "lora.r+quant")
    assert set(attempts(sweep).values()) == {1}
    assert len(attempts(sweep)) == 6
    for label in attempts(sweep):
        assert label in done.stdout
    parents, children = mlflow_runs(tmp_path / "outputs")
    assert [run.info.run_name for run in parents] == ["lora.r+quant"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert [run.info.status for run in parents + children] == ["FINISHED"] * 7
    assert {(run.data.params["quant._target_"], run.data.params["lora.r"]) for run in children} == {
        (target, r) for target in {run.data.params["quant._target_"] for run in children} for r in ("4", "8")
    }

    again = runner(*six, cwd=tmp_path)
    assert again.returncode == 0
    assert "6 of 6 jobs are already completed: skipped" in again.stderr
    assert set(attempts(sweep).values()) == {1}

    more = runner("-m", *SMALL, "lora.r=4,8,16", "quant=none,8bit,4bit", cwd=tmp_path)  # in another order, too
    assert more.returncode == 0, more.stderr
    assert "6 of 9 jobs are already completed: skipped" in more.stderr
    assert list(attempts(sweep).values()) == [1] * 9
    parents, children = mlflow_runs(tmp_path / "outputs")
    assert [len(parents), len(children)] == [1, 9]


@pytest.mark.slow
def test_a_failed_job_stops_no_other_and_is_retried_on_request(tmp_path: Path, cache: Path):
    (tmp_path / "fussy.py").write_text(FUSSY)
    functions = ",".join(f"fussy.py:{name}" for name in ("one", "two", "moody", "four", "five", "six"))
    words = (
        "-m", *SMALL, "data=local", "data.path=rows.jsonl", "data/format=custom", f"data.format.function={functions}",
    )  # fmt: skip
    rows = [{"q": f"How many apples are {n} apples?", "a": f"There are {n} of them."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    failing = runner(*words, cwd=tmp_path, FUSSY="1")
    assert failing.returncode == 1, failing.stderr
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "data.format.function")
    states = [rundir.read_state() for rundir in sweep.rundirs()]
    assert [state.status for state in states] == ["completed"] * 2 + ["failed"] + ["completed"] * 3
    assert "ValueError: not today" in states[2].reason
    (told,) = [line for line in failing.stdout.splitlines() if line.startswith("failed  ")]
    assert re.match(r"failed  data\.format\.function=fussy\.py\\?:moody: ", told)  # as Hydra quotes it
    assert told.endswith("failed on this row: ValueError: not today")
    assert len(re.findall(r"│ completed +│", failing.stdout)) == 5
    assert len(re.findall(r"│ failed +│", failing.stdout)) == 1
    parents, children = mlflow_runs(tmp_path / "outputs")
    assert [run.info.status for run in parents] == ["FAILED"]
    assert sorted(run.info.status for run in children) == ["FAILED"] + ["FINISHED"] * 5

    refused = runner(*words, cwd=tmp_path)
    assert refused.returncode == 1, "what failed is not tried again by itself"
    assert "retry them with retry=true" in refused.stderr
    retried = runner(*words, "retry=true", cwd=tmp_path)
    assert retried.returncode == 0, retried.stderr
    assert list(attempts(sweep).values()) == [1] * 6, "the five were left as they are"
    parents, children = mlflow_runs(tmp_path / "outputs")
    assert [run.info.status for run in parents + children] == ["FINISHED"] * 7


FUSSY = """
import os

def moody(row):
    if os.environ.get("FUSSY"):
        raise ValueError("not today")
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

def one(row):
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

two = four = five = six = one
"""


def test_values_that_come_to_the_same_are_one_run(tmp_path: Path, cache: Path):
    done = runner("-m", *TINY, "train.max_steps=1", "seed=1,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "each configuration is run once" in done.stderr
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "seed")
    assert list(attempts(sweep).values()) == [1]


def test_a_named_sweep_and_named_folders(tmp_path: Path, cache: Path):
    words = ("-m", *TINY, "train.max_steps=1", "seed=1,2", "sweep=mine", "hydra.sweep.subdir=job-${seed}")
    done = runner(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "outputs" / "sweeps" / "mine"
    assert [RunDir(sweep / name).read_state().status for name in ("job-1", "job-2")] == ["completed"] * 2


def test_runs_in_deeper_folders_belong_to_the_sweep_and_nothing_else_is_put_there(tmp_path: Path, cache: Path):
    import mlflow

    words = ("-m", *SMALL, "seed=1,2", "sweep=mine", "hydra.sweep.subdir=part/job-${seed}")
    done = runner(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compare outputs/sweeps/mine\n" in done.stdout
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "mine")
    assert [job["folder"] for job in sweep.read()["jobs"].values()] == ["part/job-1", "part/job-2"]
    assert attempts(sweep) == {"seed=1": 1, "seed=2": 1}
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (experiment,) = [each.experiment_id for each in client.search_experiments() if each.name != "Default"]
    runs = client.search_runs([experiment])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 2
    for inside in (
        ("hydra.run.dir=outputs/sweeps/mine/a",),
        ("-m", "seed=3,4", "hydra.sweep.dir=outputs/sweeps/mine/b"),
    ):
        refused = runner(*inside, *TINY, cwd=tmp_path)
        assert refused.returncode == 2
        assert f"is inside the folder of the sweep {sweep.path}" in refused.stderr
        assert not {"a", "b"} & {path.name for path in sweep.path.iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-m", "lora.r=4,8", "hydra.sweep.dir=there"], "this folder contains other files and no sweep"),
        (["-m", "lora.r=4,8", "resume=auto"], "is for a single run, but this command starts several"),
        (["-m", "seed=1,2", "outputs_dir=a,b"], "cannot be swept"),
        (["sweep=mine"], "has no effect without -m"),
        (["launcher.parallel=2"], "has no effect without -m"),
        (["-m", "parallel=ddp", "seed=1,2"], "needs several processes"),
    ],
)
def test_sweeps_that_are_refused_leave_nothing(tmp_path: Path, words: list[str], told: str):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    done = runner(*words, *TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_another_sweeper_of_hydra_gets_our_launcher(tmp_path: Path, cache: Path):
    done = runner("-m", *TINY, "train.max_steps=1", "seed=1,2", "hydra/sweeper=basic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(attempts(SweepDir(tmp_path / "outputs" / "sweeps" / "seed")).values()) == [1, 1]
    assert [path.name for path in (tmp_path / "outputs" / "sweeps").iterdir()] == ["seed"]
