"""Processes that somebody else started are one run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import prepared
from fixtures.ranks_of_a_run import OPTIONS, TORCHRUN, environment, several, worked

from runner.errors import ConfigError, LaunchError
from runner.launch import torchrun
from runner.tracking.rundir import RunDir

ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "runner",
)  # fmt: skip


# Started by somebody else


@pytest.mark.slow
def test_accelerate_that_started_one_of_several_is_refused(tmp_path: Path):
    command = [word for word in ACCELERATE if word != "--multi_gpu"]
    done = subprocess.run([*command, "model=tiny"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "accelerate launch found no GPU and started 1 process instead of 2" in done.stderr
    assert not list(tmp_path.iterdir())


def test_settings_of_accelerate_launch_that_have_no_effect_are_refused(monkeypatch: pytest.MonkeyPatch):
    for name in torchrun.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert list(torchrun.ignored_settings()) == [], "accelerate launch did not start this process"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    for refuse in (torchrun.refuse_lonely, lambda: torchrun.Joined(2).refuse([], is_sweep=False)):
        with pytest.raises(ConfigError) as error:
            refuse()
        assert [fault.key for fault in error.value.faults] == ["--mixed_precision", "--use_fsdp"]
    assert "model.dtype=bfloat16 (and --mixed_precision no, if accelerate config set it)" in str(error.value)


def test_several_tasks_of_srun_do_not_train_a_run_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    torchrun.refuse_srun()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(LaunchError, match=r"launcher=slurm launcher\.tasks_per_node=2 submits one run of 2 processes"):
        torchrun.refuse_srun()
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit, match="2"):
        torchrun.refuse_srun()
    monkeypatch.setenv("RANK", "1")
    torchrun.refuse_srun()


@pytest.mark.slow
@pytest.mark.parametrize("command", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_processes_started_by_others_leave_one_folder_and_one_run(
    tmp_path: Path, cache: Path, command: tuple[str, ...]
):
    import mlflow

    options = [option for option in OPTIONS if not option.startswith("tracking")]
    words = [*command, *options, f"outputs_dir={tmp_path}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    (state,) = tmp_path.rglob("state.json")
    rundir = RunDir(state.parent)
    assert rundir.read_state().status == "completed"
    assert done.stdout.count(f"run      {rundir.path}  completed") == 1
    assert done.stderr.count("step 6/6  loss") == 1
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert len(client.get_metric_history(runs[0].info.run_id, "train/loss")) == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("trian.max_steps=3", "did you mean 'train.max_steps'?"),
        pytest.param("parallel=none", "the launcher starts 2 processes", marks=pytest.mark.slow),
        pytest.param(
            "launcher=local", "torchrun or accelerate launch has started 2 processes already", marks=pytest.mark.slow
        ),
    ],
)
def test_a_refusal_among_several_is_one_message(tmp_path: Path, cache: Path, wrong: str, message: str):
    words = [*TORCHRUN, *OPTIONS, f"outputs_dir={tmp_path / 'out'}", wrong]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_run_is_refused_by_other_than_its_number_of_processes(tmp_path: Path, cache: Path):
    from runner.train import worker

    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    assert worker.work(rundir) == 2
    assert not rundir.path.exists() or not list(rundir.path.iterdir())
    rundir = prepared(tmp_path / "one", *OPTIONS)
    code, said = worked(rundir)
    assert code == 2
    assert said.count("this run needs 1 process, but 2 processes started") == 1
