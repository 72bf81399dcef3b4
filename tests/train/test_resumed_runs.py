"""kill -9 at random moments: the run that is continued ends as the one that was never disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, TINY, prepared, until

from runner.report import results
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir

SERVER = TESTS / "fork_server.py"
OPTIONS = (
    *TINY[:1], *TINY[2:4], "data.eval_rows=4", "train.sample_prompts=1", "train.sample_tokens=4",
    "train.max_steps=24", "train.save_steps=3", "train.eval_steps=5", "train.gradient_accumulation_steps=2",
    "data.packing=true", "lora.lora_dropout=0.2", "tracking.system_metrics=false", "optim.learning_rate=1e-2",
)  # fmt: skip
TIMES = ("time", "train/tokens_per_second", "train/step_seconds", "train/data_wait_fraction", "train/mfu")


def outcome(rundir: RunDir) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    records = [
        {k: v for k, v in record.items() if k not in TIMES and not k.startswith("memory/")}
        for record in metrics_log.read(rundir)
    ]
    weights = (rundir.model / "adapter_model.safetensors").read_bytes()
    return {"records": records, "weights": weights, "samples": rundir.samples.read_text()}


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path, cache: Path):
    import mlflow

    options = (*OPTIONS, f"outputs_dir={tmp_path}")
    rundirs = [prepared(tmp_path / "runs" / str(number), *options) for number in range(11)]
    command = [sys.executable, str(SERVER), "kill", "0", *(str(rundir.path) for rundir in rundirs), "--", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    reference, *killed = rundirs
    expected = outcome(reference)
    assert [r["step"] for r in expected["records"] if "train/loss" in r] == list(range(1, 25))
    attempts = [rundir.read_state().attempt for rundir in killed]
    for rundir in killed:
        assert rundir.read_state().status == "completed"
        assert outcome(rundir) == expected, rundir.path
    assert sum(attempts) >= len(killed) + 5, "too few kills came while it was training"

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert len(runs) == len(rundirs), "one MLflow run each"
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == list(range(1, 25)), "no gap and nothing twice"


def worker_process(rundir: RunDir) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runner.worker", str(rundir.path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(rundir: RunDir, step: int, process: subprocess.Popen[str]) -> None:
    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        state = rundir.read_state()
        return state.status == "running" and state.step >= step

    until(is_there, every_s=0.002)  # a tiny model makes 30 steps in 0.2 s


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGTERM, 75, "preempted"), (signal.SIGINT, 130, "killed")]
)
def test_signals_save_and_say_how_it_ended(tmp_path: Path, cache: Path, number: int, code: int, status: str):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=2000", "train.save_steps=null")
    process = worker_process(rundir)
    wait_for_step(rundir, 2, process)
    process.send_signal(number)
    out, _ = process.communicate()
    state = rundir.read_state()
    assert (process.returncode, state.status) == (code, status)
    assert f"the state is saved at step {state.step}" in state.reason
    assert f"resume={rundir.path}" in out
    saved = json.loads(next(rundir.checkpoints.glob("step-*/progress.json")).read_text())
    assert saved["step"] == state.step
    assert metrics_log.read(rundir)[-1]["step"] == state.step


def test_a_completed_run_is_left_alone(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    from runner.train import worker

    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=1")
    assert worker.work(rundir) == 0
    before = {path: path.stat().st_mtime_ns for path in rundir.path.rglob("*")}
    assert worker.work(rundir) == 0
    assert {path: path.stat().st_mtime_ns for path in rundir.path.rglob("*")} == before
    assert "completed already" in capfd.readouterr().err


def test_the_same_command_again_continues_and_then_leaves_alone(tmp_path: Path, cache: Path):
    """From the command line as users give it: stopped by a signal, given again, and once more."""
    options = (*TINY, f"outputs_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}", "train.max_steps=150")
    command, rundir = [sys.executable, "-m", "runner", *options], RunDir(tmp_path / "run")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while rundir.read_state().step < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert (process.returncode, rundir.read_state().status) == (75, "preempted")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, rundir.read_state().status) == (0, "completed"), done.stderr
    assert "resumed at step" in done.stderr
    assert rundir.read_state().attempt == 2
    assert [r["step"] for r in metrics_log.read(rundir) if "train/loss" in r] == list(range(1, 151))

    before = {path: path.stat().st_mtime_ns for path in rundir.path.rglob("*")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"{rundir.path} is completed already: nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in rundir.path.rglob("*")} == before


def stopped_at(rundir: RunDir, step: int) -> None:
    """Train the run up to this step, and stop it with kill -9 after a checkpoint."""
    process = worker_process(rundir)
    wait_for_step(rundir, step, process)
    process.kill()
    process.communicate()


def test_what_a_run_has_lost_is_reported_and_not_shown(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    """Records and samples are gone: neither a later loss nor the answers of a half-trained model become "before"."""
    from runner.train import worker

    options = (*OPTIONS, f"outputs_dir={tmp_path}", "train.max_steps=40", "tracking=offline")
    rundir = prepared(tmp_path / "run", *(word for word in options if not word.startswith("tracking.")))
    stopped_at(rundir, 8)
    rundir.metrics.unlink()
    rundir.samples.write_text("[")
    assert worker.work(rundir) == 0
    out = capfd.readouterr().out
    summary = rundir.read_state().summary
    assert "eval/loss before" not in summary
    assert f"unknown → {summary['eval/loss']:.4f}  (its record is lost)" in out
    assert "%)" not in out.partition("perplexity")[0], "no change in percent"
    assert {key for sample in json.loads(rundir.samples.read_text()) for key in sample} == {
        "prompt", "reference", "after"
    }  # fmt: skip
    log = rundir.log.read_text()
    assert "metrics.jsonl is incomplete" in log
    assert "samples.json is lost" in log
    (result,) = results.of_folders([rundir], tmp_path)
    assert "eval/best_loss" not in result.metrics
    assert (result.status, result.metrics["eval/loss"]) == ("completed", summary["eval/loss"])
    assert "metrics.jsonl is incomplete" in result.reason


def test_a_removed_folder_fails_the_run_and_is_not_created_again(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=2000", "train.save_steps=5")
    process = worker_process(rundir)
    wait_for_step(rundir, 6, process)
    rundir.path.rename(tmp_path / "elsewhere")
    out, err = process.communicate()
    assert process.returncode == 1, out
    assert "was removed while the run trained" in err
    assert "completed" not in out
    assert not rundir.model.exists()


def test_a_damaged_state_and_manifest_are_rebuilt_and_the_run_continues(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=30", "train.save_steps=5")
    stopped_at(rundir, 12)
    saved = rundir.saved_step()
    rundir.state.write_text('{"status": "run')
    before = rundir.read_manifest()
    rundir.manifest.write_text("{")
    process = worker_process(rundir)
    _, err = process.communicate()
    state = rundir.read_state()
    after = json.loads(rundir.manifest.read_text())
    assert (after["id"], after["created"]) == (before["id"], before["created"])
    assert (process.returncode, state.status, state.step) == (0, "completed", 30), err
    assert f"resumed at step {saved}/30" in err
    assert [r["step"] for r in metrics_log.read(rundir) if "train/loss" in r] == list(range(1, 31))
