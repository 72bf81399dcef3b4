"""Against a real Slurm (scripts/slurm-lab/up): arrays, several nodes, interruptions of every kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TESTS, until
from fixtures.slurm_runs import BASE, SHORT, SLURM, has_left_the_queue, job_of, mlflow_runs, runner, slurm_says, weights

from runner.tracking import metrics_log
from runner.tracking.lookup import find_runs
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

ROOT = TESTS.parent
LONG = (
    *BASE, "train.max_steps=60", "train.save_steps=10", "train.eval_steps=25", "train.gradient_accumulation_steps=8",
    "lora.lora_dropout=0.1", "data.packing=true",
)  # fmt: skip
"""Some seconds of training beyond the step at which it is stopped: it cannot end before that is done."""
TIMES = ("time", "train/tokens_per_second", "train/step_seconds", "train/data_wait_fraction", "train/mfu")


def records(rundir: RunDir) -> list[dict[str, Any]]:
    """All that was recorded but for how long it took."""
    return [
        {key: value for key, value in record.items() if key not in TIMES and not key.startswith("memory/")}
        for record in metrics_log.read(rundir)
    ]


def steps_in_mlflow(run: Any, outputs: str = "outputs") -> list[int]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{Path(outputs).absolute() / 'mlflow.db'}")
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.mark.slurm
@pytest.mark.slow
def test_an_array_of_four_throttled_to_two_computes_what_the_local_run_does(slurm: None):
    words = ("-m", *SHORT, *SLURM, "seed=range(4)", "launcher.array_parallelism=2", "launcher.wait=true")
    done = runner(*words)
    assert done.returncode == 0, done.stderr
    rundirs = SweepDir(Path("outputs/sweeps/seed").absolute()).rundirs()
    assert [rundir.read_state().status for rundir in rundirs] == ["completed"] * 4
    ids = [job_of(rundir) for rundir in rundirs]
    assert {id.partition("_")[0] for id in ids} == {ids[0].partition("_")[0]}, "one array"
    assert most_at_once(ids) <= 2
    parents = [run for run in mlflow_runs() if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in mlflow_runs() if "mlflow.parentRunId" in run.data.tags]
    assert [len(parents), len(children)] == [1, 4]
    assert {run.info.status for run in parents + children} == {"FINISHED"}
    assert {run.data.tags["runner.slurm_job_id"] for run in children} == set(ids)

    here = runner(*SHORT, "seed=3", "hydra.run.dir=here", "tracking=offline")
    assert here.returncode == 0, here.stderr
    assert weights(RunDir(Path("here"))) == weights(rundirs[3])

    again = runner(*words)
    assert again.returncode == 0
    assert "4 of 4 jobs are already completed: skipped" in again.stderr


def most_at_once(ids: list[str]) -> int:
    """How many of these jobs ran at the same second, from Slurm's accounting."""
    lines = slurm_says("sacct", "-nPX", "-j", ids[0].partition("_")[0], "-o", "Start,End").splitlines()
    spans = [tuple(line.split("|")) for line in lines]
    assert len(spans) == len(ids)
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


@pytest.mark.slurm
@pytest.mark.slow
def test_two_nodes_of_two_tasks_compute_what_four_processes_here_do(slurm: None):
    several = ("launcher.nodes=2", "launcher.tasks_per_node=2", "launcher.wait=true")
    done = runner(*SHORT, *SLURM, *several, "hydra.run.dir=there")
    assert done.returncode == 0, done.stderr
    here = runner(*SHORT, "launcher=accelerate", "launcher.processes=4", "hydra.run.dir=here", "tracking=offline")
    assert here.returncode == 0, here.stderr
    there, local = RunDir(Path("there")), RunDir(Path("here"))
    assert there.read_manifest()["signature"] == local.read_manifest()["signature"]
    assert weights(there) == weights(local)
    nodes = slurm_says("sacct", "-nPX", "-j", job_of(there), "-o", "NNodes,NTasks,State")
    assert nodes.startswith("2|")
    assert [run.info.status for run in mlflow_runs()] == ["FINISHED"]


@pytest.mark.slurm
@pytest.mark.slow
def test_whatever_interrupts_a_run_it_ends_as_the_undisturbed_one(slurm: None):
    disturbed = {
        "timed_out": ("launcher.nodelist=n2", "launcher.timeout_min=2", "launcher.signal_delay_s=30"),
        "preempted": ("launcher.partition=low", "launcher.nodelist=n1"),
        "requeued": ("launcher.nodelist=n3",),
        "orphaned": ("launcher.exclude='n[1-3]'",),
    }
    rundirs = {name: RunDir(Path(name).absolute()) for name in disturbed}
    for name, where in disturbed.items():
        done = runner(*LONG, *SLURM, *where, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
        stop_at_step(rundirs[name], 12)
    slurm_says("sbatch", "--partition=main", "--nodelist=n1", "--exclusive", "--time=5", "--wrap=sleep 2")
    slurm_says("scontrol", "requeue", job_of(rundirs["requeued"]))
    kill_node("n4", rundirs["orphaned"])
    try:
        until(lambda: slurm_says("squeue", "-h", "-o", "%T", "-j", job_of(rundirs["orphaned"])) == "PENDING")
    finally:
        subprocess.run(["slurmd", "-N", "n4"], check=False)
    until(lambda: rundirs["timed_out"].read_state().attempt >= 2)  # it was warned, saved and is back
    slurm_says("scontrol", "update", f"jobid={job_of(rundirs['timed_out'])}", "TimeLimit=60")
    reference = RunDir(Path("reference").absolute())
    done = runner(*LONG, "hydra.run.dir=reference", "tracking=offline")
    assert done.returncode == 0, done.stderr
    for rundir in rundirs.values():
        until(lambda rundir=rundir: rundir.read_state().status == "completed")
        until(lambda rundir=rundir: has_left_the_queue(rundir))
    for name, rundir in rundirs.items():
        assert rundir.read_state().attempt >= 2, f"{name}: nothing interrupted it"
        assert weights(rundir) == weights(reference), name
        assert records(rundir) == records(reference), name
    runs = mlflow_runs()
    assert len(runs) == len(rundirs), "one MLflow run each"
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert steps_in_mlflow(run) == list(range(1, 61)), "no gap and nothing twice"


def stop_at_step(rundir: RunDir, step: int) -> None:
    """Stop the worker where it is, so that it cannot end before it is disturbed; Slurm continues whom it warns."""
    until(lambda: rundir.read_state().step >= step)
    psutil.Process(rundir.read_state().pid).suspend()


def kill_node(name: str, rundir: RunDir) -> None:
    """What a power cut does: the node's daemon, what it started, and the worker are gone at once."""
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["name"] == "slurmd" and words[-1:] == [name]:
            process.kill()
    worker = psutil.Process(rundir.read_state().pid)
    family = [worker, *worker.parents()]
    for process in family:
        if (
            process.name() in ("slurmstepd", "srun")
            or process is worker
            or "slurm_script" in " ".join(process.cmdline())
        ):
            process.kill()


@pytest.mark.slurm
@pytest.mark.slow
def test_a_crash_is_failed_everywhere(slurm: None):
    words = (*SHORT, *SLURM, "optim.learning_rate=1e30", "train.max_steps=20", "hydra.run.dir=crash")
    done = runner(*words, "launcher.wait=true")
    assert done.returncode == 1, done.stderr
    rundir = RunDir(Path("crash").absolute())
    assert rundir.read_state().status == "failed"
    assert slurm_says("sacct", "-nPX", "-j", job_of(rundir), "-o", "State") == "FAILED"
    logs = runner("logs", "crash")
    assert "Traceback (most recent call last)" in logs.stdout
    assert rundir.read_state().reason.splitlines()[0] in logs.stdout
    assert [run.info.status for run in mlflow_runs()] == ["FAILED"]


@pytest.mark.slurm
@pytest.mark.slow
def test_later_edits_do_not_reach_a_queued_job(slurm: None):
    shutil.copytree(ROOT / "src", "checkout/src")
    shutil.copytree(ROOT / "conf", "checkout/conf")
    there = {"PYTHONPATH": str(Path("checkout/src").absolute())}
    words = (*SHORT, *SLURM, "hydra.run.dir=queued", "+launcher.additional_parameters.hold=true")
    done = runner(*words, **there)
    assert done.returncode == 0, done.stderr
    rundir = RunDir(Path("queued").absolute())
    assert Path(rundir.read_manifest()["snapshot"]["folder"], "runner", "train", "loop.py").exists()
    for file in ("src/runner/train/loop.py", "src/runner/train/worker.py", "conf/lora/lora.yaml", "conf/config.yaml"):
        Path("checkout", file).write_text("broken: [\n")
    slurm_says("scontrol", "release", job_of(rundir))
    until(lambda: has_left_the_queue(rundir))
    assert rundir.read_state().status == "completed", rundir.read_state().reason
    here = runner(*SHORT, "hydra.run.dir=here", "tracking=offline")
    assert here.returncode == 0, here.stderr
    assert weights(RunDir(Path("here"))) == weights(rundir)


@pytest.mark.slurm
def test_a_submitter_killed_before_it_notes_the_job_submits_it_once(slurm: None):
    Path("bin").mkdir()
    sbatch = Path("bin/sbatch")
    real = shutil.which("sbatch")
    sbatch.write_text(f'#!/bin/bash\n[[ "$*" == *--test-only* ]] && exec {real} "$@"\n{real} "$@"\nkill -9 $PPID\n')
    sbatch.chmod(0o755)
    words = (*SHORT, *SLURM, "hydra.run.dir=once", "tracking=offline", "+launcher.additional_parameters.hold=true")
    killed = runner(*words, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert killed.returncode == -signal.SIGKILL
    [file] = Path("once/slurm").glob("runner-*.json")
    name = json.loads(file.read_text())["name"]
    assert json.loads(file.read_text())["job_id"] is None
    status = json.loads(runner("status", "once", "--json").stdout)
    assert [run["status"] for run in status] == ["queued"], "Slurm has it, whatever was noted"
    again = runner(*words)
    assert again.returncode == 0, again.stderr
    jobs = slurm_says("squeue", "-h", "-n", name, "-o", "%i").split()
    assert jobs == [job_of(RunDir(Path("once").absolute()))]
    assert slurm_says("squeue", "-h", "-o", "%j").split().count(name) == 1
    assert len(list(Path("once/slurm").glob("runner-*.json"))) == 1


@pytest.mark.slow
def test_without_slurm_what_is_cancelled_before_it_began_never_begins(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = runner(*SHORT, "launcher=slurm", "launcher.cluster=local", "hydra.run.dir=run", "tracking=offline")
    assert done.returncode == 0, done.stderr
    rundir = RunDir(tmp_path / "run")
    supervisor = psutil.Process(int(job_of(rundir)))
    done = runner("cancel", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed: cancelled by " in done.stdout
    psutil.wait_procs([supervisor])
    assert not supervisor.is_running()
    assert (rundir.read_state().status, rundir.read_state().attempt) == ("killed", 0)


@pytest.mark.slow
def test_without_slurm_a_sweep_runs_detached_on_this_machine(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = runner("-m", *SHORT, "launcher=slurm", "launcher.cluster=local", "seed=1,2", "tracking=offline")
    assert done.returncode == 0, done.stderr
    rundirs = find_runs(Path("outputs"))
    until(lambda: [rundir.read_state().status for rundir in rundirs] == ["completed"] * 2)
    assert [rundir.read_state().attempt for rundir in rundirs] == [1, 1]
